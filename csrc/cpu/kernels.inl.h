/* kernels.inl.h - all kernel bodies over the vector vocabulary included before it, and the table
 * of this instruction set. */
#include "../core.h"
#include <float.h>

#define MKVQ_LEADS 1 /* this thread has all lanes of a vector */

/* x by the scale of a group: cuda/octet.h has another way */
#define vf_quotient(x, scale) vf_div(x, vf_set1(scale))

#include "load.inl.h"

#include "hadamard.inl.h"

#include "group.inl.h"

#include "search.inl.h"

#include "measure.inl.h"

#include "tiers.inl.h"

#include "budget.inl.h"

#include "metadata.inl.h"

#include "pack.inl.h"

#include "pack_unit.inl.h"

#include "unpack.inl.h"

#include "salience.inl.h"

#include "dot.inl.h"

#include "fold.inl.h"

#include "window.inl.h"

#include "query.inl.h"

#include "weight.inl.h"

#include "attend.inl.h"

const mkvq_kernels MKVQ_ISA_TABLE = {MKVQ_ISA_NAME, salience_unit, pack_reference_unit, pack_unit,
                                     unpack_unit,   attend_unit,   merge_unit};
