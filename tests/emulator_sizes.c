/* emulator_sizes.c - sizes of the public structs and where their last members lie, for the mirrors in
 * emulator.py. */
#include "../csrc/mixkvq.h"
#include <stddef.h>

#define SIZES(type, last) {#type, sizeof(type), offsetof(type, last)}

typedef struct {
    const char *name;
    int64_t size, last;
} struct_sizes;

const struct_sizes mkvq_struct_sizes[] = {
    SIZES(mkvq_error, value),
    SIZES(mkvq_view, dtype),
    SIZES(mkvq_codec, patterns),
    SIZES(mkvq_history, record_bytes),
    SIZES(mkvq_salience_args, executor),
    SIZES(mkvq_pack_args, executor),
    SIZES(mkvq_unpack_args, executor),
    SIZES(mkvq_append_args, exact),
    SIZES(mkvq_attend_args, executor),
    {NULL, 0, 0},
};
