/* status.c - texts of the status codes. */
#include "mixkvq.h"

const char *mkvq_status_text(mkvq_status status)
{
    switch (status) {
    case MKVQ_OK: return "ok";
    case MKVQ_E_NULL: return "missing argument";
    case MKVQ_E_DTYPE: return "wrong element type";
    case MKVQ_E_SHAPE: return "wrong shape";
    case MKVQ_E_VALUE: return "value out of range";
    case MKVQ_E_SPACE: return "output too small";
    case MKVQ_E_MAGIC: return "not a MixKVQ record";
    case MKVQ_E_VERSION: return "unsupported record version";
    case MKVQ_E_RECORD: return "damaged record";
    case MKVQ_E_ISA: return "instruction set not available";
    case MKVQ_E_DEVICE: return "CUDA error";
    }
    return "unknown status";
}
