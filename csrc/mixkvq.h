/* mixkvq.h - the C core of MixKVQ and its manual.
 *
 * The core packs blocks of a KV cache into records (docs/format.md), reads them back, and
 * computes attention of queries over packed blocks followed by a window of exact tokens. It is
 * C11, allocates nothing, prints nothing, and keeps no global but the kernel table chosen at
 * first use. Every function
 *   - checks all its arguments first (check.c) and returns a status, with nothing written, if
 *     one is wrong;
 *   - can be called from several threads at once on different outputs;
 *   - gives the same bytes for every instruction set and every number of threads (attention: the
 *     same float operations in the same order within one instruction set).
 *
 * Arrays are described by `mkvq_view`: address, element type, shape and strides in elements, so
 * that a model's transposed or fused projections are read where they lie. "[B,H]" without a view
 * means a dense C array. Names: B batch rows, H key/value heads, Q query heads (a multiple of H:
 * query head h reads KV head h / (Q/H)), D head_dim, n tokens of a call, T tokens of a block. */
#ifndef MIXKVQ_H
#define MIXKVQ_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

#define MKVQ_API_VERSION 3
#define MKVQ_CAPSULE "mixkvq._core._C_API"
#define MKVQ_MAX_HEAD_DIM 256 /* and a multiple of 8 */
/* Tokens of a coded block, a multiple of 32; exact records hold up to 65535. */
#define MKVQ_MAX_BLOCK 1024
#define MKVQ_MAX_PATTERNS 16
/* Place of a record: slab index << 40 | byte offset in the slab; -1: none. */
#define MKVQ_SLAB_SHIFT 40

/* ---- errors are values ----------------------------------------------------------------------- */
typedef enum {
    MKVQ_OK = 0,
    MKVQ_E_NULL,    /* a pointer that must be given is missing */
    MKVQ_E_DTYPE,   /* an element type that is not allowed, or differs from its partner */
    MKVQ_E_SHAPE,   /* a size that contradicts another, or is out of range */
    MKVQ_E_VALUE,   /* a field outside its allowed set */
    MKVQ_E_SPACE,   /* an output too small for what it must hold */
    MKVQ_E_MAGIC,   /* not a record */
    MKVQ_E_VERSION, /* a record of another version */
    MKVQ_E_RECORD,  /* a record whose fields contradict each other or its length */
    MKVQ_E_ISA,     /* an instruction set that is unknown, not built, or not supported */
    MKVQ_E_DEVICE   /* a call of the CUDA runtime that failed; `value` is its error */
} mkvq_status;

/* What went wrong, for a message such as "k: head_dim is 63, must be a multiple of 8 from 8 to
 * 256". Strings are static. */
typedef struct {
    const char *argument; /* name of the argument or field */
    const char *allowed;  /* what it must be */
    int64_t value;        /* what it was */
} mkvq_error;

const char *mkvq_status_text(mkvq_status status);

/* ---- running in parallel --------------------------------------------------------------------- */
/* Calls body(begin, end, ctx) on disjoint ranges that cover [0, n), possibly from several
 * threads, and returns when all are done. A NULL executor means "this thread". The core never
 * starts a thread. */
typedef void (*mkvq_body)(int64_t begin, int64_t end, void *ctx);
typedef void (*mkvq_executor)(int64_t n, int64_t grain, mkvq_body body, void *ctx);

/* ---- arrays ---------------------------------------------------------------------------------- */
typedef enum {
    MKVQ_F32 = 1,
    MKVQ_F16 = 2,
    MKVQ_BF16 = 3,
    MKVQ_BOOL = 4
} mkvq_dtype; /* BOOL: masks only, one byte */

typedef struct {
    void *data; /* const for inputs by contract */
    int64_t shape[4];
    int64_t stride[4]; /* in elements; 0 broadcasts what is only read */
    int32_t dtype;
} mkvq_view;

/* ---- how a block is coded (docs/format.md section 4) ----------------------------------------- */
typedef enum {
    MKVQ_TIER_1,
    MKVQ_TIER_2,
    MKVQ_TIER_3,
    MKVQ_TIER_4,
    MKVQ_TIER_8,
    MKVQ_TIER_EXACT,
    MKVQ_TIERS
} mkvq_tier;
typedef enum { MKVQ_META_E5M3_INT8, MKVQ_META_FP16_FP16 } mkvq_metadata;
typedef enum { MKVQ_RANGE_MINMAX, MKVQ_RANGE_SEARCH, MKVQ_RANGE_SEARCH_MSE } mkvq_range;
typedef enum {
    MKVQ_ALLOCATE_PATTERNS,
    MKVQ_ALLOCATE_THRESHOLD,
    MKVQ_ALLOCATE_EXACT,
    MKVQ_ALLOCATE_BUDGET, /* the best split of each head that fits a number of columns */
    MKVQ_ALLOCATE_LAYER   /* the same, with the columns of all heads of a row pooled */
} mkvq_allocate;
typedef enum { MKVQ_COST_MODEL, MKVQ_COST_MEASURED } mkvq_cost;

typedef struct {
    int32_t head_dim;      /* 8 ... 256, a multiple of 8 */
    int32_t block_length;  /* T: a multiple of 32 and key_group to 1024; exact: 1 to 65535 */
    int32_t dtype;         /* of K, V, exact channels and exact records */
    int32_t allocate;      /* mkvq_allocate; EXACT: exact records, ignores all that follows */
    int32_t key_group;     /* tokens that share a key scale, a multiple of 8 that divides T */
    int32_t key_metadata;  /* mkvq_metadata */
    int32_t key_range;     /* mkvq_range */
    int32_t key_reference; /* 1: code k - mu */
    int32_t value_bits;    /* 1, 2, 3, 4, 8; 0 = exact */
    int32_t value_group; /* channels that share a value scale, a multiple of 8, at most head_dim */
    int32_t value_metadata;
    int32_t value_range;
    int32_t value_rotation; /* 1: Hadamard */
    int32_t pattern_cost;   /* mkvq_cost; of PATTERNS, BUDGET and LAYER */
    int32_t budget_columns; /* BUDGET, LAYER: key columns per head, ceil(head_dim / 32) ...
                               head_dim / 4 */
    int32_t n_patterns;     /* 1 ... 16 when allocate is PATTERNS */
    float threshold_high, threshold_low; /* when allocate is THRESHOLD: high >= low >= 0 */
    uint16_t patterns[MKVQ_MAX_PATTERNS]
                     [MKVQ_TIERS]; /* channels per tier, each summing to head_dim */
} mkvq_codec;

mkvq_status mkvq_check_codec(const mkvq_codec *codec, mkvq_error *error);
/* Bytes of the largest record that this codec can produce (an exact record, or a coded one if
 * that is larger); 0 if it is no codec. */
int64_t mkvq_record_bound(const mkvq_codec *codec);

/* ---- records --------------------------------------------------------------------------------- */
typedef struct {
    int32_t kind, dtype, value_bits, head_dim, tokens, key_group, value_group;
    int32_t key_metadata, value_metadata, key_reference, value_rotation;
    int32_t channels[MKVQ_TIERS];       /* per tier; an exact record: all in MKVQ_TIER_EXACT */
    int64_t nbytes;                     /* = header_bytes + metadata_bytes + code_bytes + padding */
    int64_t metadata_bytes, code_bytes; /* code_bytes: columns, rows, exact values */
    uint8_t tier[MKVQ_MAX_HEAD_DIM];    /* tier id per channel */
} mkvq_record_info;

/* Reads and fully checks a record of which `available` bytes may be read. */
mkvq_status mkvq_inspect(const void *record, int64_t available, mkvq_record_info *info,
                         mkvq_error *error);

/* ---- salience statistics --------------------------------------------------------------------- */
/* sum[b,h,d] += |q|^power over the queries first[b] <= i < n and the query heads of KV head h;
 * tokens in order, inside a token the heads in order, in float64: the result does not depend on
 * how a sequence is cut into calls. The caller counts (n - first[b]) * Q/H head-tokens per row. */
typedef struct {
    mkvq_view q;          /* [B,Q,n,D] float */
    int32_t kv_heads;     /* H */
    int32_t power;        /* 1: mean absolute value, 2: root mean square */
    const int64_t *first; /* [B], 0 ... n; NULL: all 0 */
    double *sum;          /* [B,H,D] */
    mkvq_executor executor;
} mkvq_salience_args;
mkvq_status mkvq_salience(const mkvq_salience_args *args, mkvq_error *error);

/* ---- packing --------------------------------------------------------------------------------- */
/* For every row b, head h and j < blocks[b]: packs tokens first[b] + j*T ... + T of k and v into
 * out + ((b*H + h) * max_blocks + j) * out_stride and stores the record's length in sizes[b,h,j]
 * (0 for j >= blocks[b]). Blocks of a head are taken in order; the first that becomes a coded
 * record sets mu where has_mu is 0. Slots of out may be scribbled on behind the record. Cost: one
 * pass for statistics, one for codes. Threads share heads until they have mu, then blocks; with LAYER
 * rows and blocks of all heads. */
typedef struct {
    const mkvq_codec *codec;
    mkvq_view k, v;        /* [B,H,n,D], codec->dtype */
    const int64_t *first;  /* [B] */
    const int64_t *blocks; /* [B], 0 ... max_blocks */
    int64_t max_blocks;
    const float *importance; /* [B,H,D] I_d, finite and >= 0; NULL: all 1 */
    uint16_t *mu; /* [B,H,D] float16 bits and [B,H] 0/1, updated; NULL unless key_reference */
    uint8_t *has_mu;
    uint8_t *out;       /* 64-byte aligned */
    int64_t out_stride; /* >= mkvq_record_bound, a multiple of 64 */
    int64_t *sizes;     /* [B,H,max_blocks] */
    int64_t *raised;    /* [B,H,max_blocks] raised scales of each record; may be NULL */
    mkvq_executor executor;
} mkvq_pack_args;
mkvq_status mkvq_pack(const mkvq_pack_args *args, mkvq_error *error);

/* ---- the packed history of a layer ----------------------------------------------------------- */
typedef struct {
    const uint64_t *slab_base; /* [slabs] addresses, of which only their alignment can be checked */
    const int64_t *slab_bytes; /* [slabs], all of which must be readable */
    int64_t slabs;
    const int64_t *place;  /* [B,H,place_stride]: slab << MKVQ_SLAB_SHIFT | offset */
    int64_t place_stride;  /* entries per head, >= every blocks[b] */
    const int64_t *blocks; /* [B] records per head */
    const uint16_t *mu; /* [B,H,D] float16 bits; NULL when no record is coded against a reference */
    int32_t batch, kv_heads, head_dim;
    /* Set by mkvq_check_history; 0, 0: every call reads and checks all records itself. */
    int32_t checked;      /* 1: records, places and numbers of blocks are as they were checked */
    int32_t block_tokens; /* of every record, 0 if they differ or are not known */
    int64_t
        record_bytes; /* of the largest record; read by CUDA kernels only (cuda/mixkvq_cuda.h) */
} mkvq_history;

/* Checks all records of a history once, so that calls need not; they must not change after. */
mkvq_status mkvq_check_history(mkvq_history *history, mkvq_error *error);

/* Writes the decoded tokens of row b to k and v from token index first[b] on, rounded to the
 * dtype of the views. */
typedef struct {
    const mkvq_history *history;
    mkvq_view k, v;       /* [B,H,n,D] float */
    const int64_t *first; /* [B] */
    mkvq_executor executor;
} mkvq_unpack_args;
mkvq_status mkvq_unpack(const mkvq_unpack_args *args, mkvq_error *error);

/* ---- the exact window ------------------------------------------------------------------------ */
/* Row b of the buffers k, v [B,H,C,D] holds exact[b] tokens: first the sinks (the first
 * min(sink_length, exact[b]) tokens of the row), then the newest tokens. Packed blocks lie
 * between the two. mkvq_append copies the n new tokens of every row behind them and adds n to
 * exact[b]. */
typedef struct {
    mkvq_view k, v;         /* buffers [B,H,C,D] */
    mkvq_view k_new, v_new; /* [B,H,n,D], same dtype */
    int64_t *exact;         /* [B] */
} mkvq_append_args;
mkvq_status mkvq_append(const mkvq_append_args *args, mkvq_error *error);

/* ---- attention ------------------------------------------------------------------------------- */
/* How codes are multiplied. EXACT: in float32, relative L2 error against float64 attention on the
 * unpacked values below 1e-5. DEFAULT: queries and probabilities as 16-bit integers. FAST: as
 * DEFAULT, but queries as 8-bit integers where they meet columns of two-bit keys only. Rounding is
 * relative to the largest product of a query row, so that these errors grow with the logits: below
 * 2e-3 (6e-2) where their standard deviation is at most 16 (2). Exact tokens and channels are
 * always multiplied in float32. */
typedef enum { MKVQ_PRECISION_DEFAULT, MKVQ_PRECISION_EXACT, MKVQ_PRECISION_FAST } mkvq_precision;

/* out = softmax(cap(scaling * q k^T) + mask) v over, per row, sinks, packed blocks and window,
 * in this order. Let N_b = exact[b] + tokens in blocks: token t of row b is column start[b] + t
 * of the mask, and query i stands at token N_b - n + i (what CAUSAL means). cap(s) = softcap *
 * tanh(s / softcap). sink_logits[Q] add exp(logit) to the denominator (attention sinks of gpt-
 * oss). A query that may see no token gets zeros. A NaN or Inf in a key reaches the queries that
 * may see the token, one in a value all queries of its head (0 * NaN), as in unfused attention.
 * Heads with many blocks are cut into runs, whose results are merged: this takes
 * mkvq_attend_workspace(args) bytes; without a workspace no head is cut. Results depend on whether
 * there is one, in the last bits, never on the number of threads. */
typedef enum { MKVQ_MASK_NONE, MKVQ_MASK_CAUSAL, MKVQ_MASK_ARRAY } mkvq_mask;
typedef struct {
    mkvq_view q, out;            /* [B,Q,n,D] float; out may have any strides and another dtype */
    const mkvq_history *history; /* required; blocks may all be 0 */
    mkvq_view k, v;              /* exact buffers [B,H,C,D] float */
    const int64_t *exact;        /* [B]; at least sink_length in a row that has blocks */
    const int64_t *start;        /* [B] mask column of token 0; NULL: all 0 */
    int32_t sink_length;
    int32_t mask_kind; /* mkvq_mask */
    mkvq_view mask;    /* ARRAY: [B,Q,n,columns], BOOL (nonzero = may attend) or float (added) */
    float scaling, softcap;   /* softcap 0: none */
    const float *sink_logits; /* [Q] or NULL */
    int32_t precision;        /* mkvq_precision */
    void *workspace;          /* aligned to 4 bytes, or NULL */
    int64_t workspace_bytes;
    mkvq_executor executor;
} mkvq_attend_args;
/* Bytes of workspace for these sizes of q and history; 0 if they do not fit each other. */
int64_t mkvq_attend_workspace(const mkvq_attend_args *args);
mkvq_status mkvq_attend(const mkvq_attend_args *args, mkvq_error *error);

/* ---- instruction sets ------------------------------------------------------------------------ */
/* Levels built into this library, best last: "scalar", "avx2", "avx512" or "scalar", "neon",
 * "neon-dot". The best supported one is used until another is chosen. */
int mkvq_isa_count(void);
const char *mkvq_isa_name(int level);
int mkvq_isa_supported(int level);          /* by this CPU */
const char *mkvq_isa(void);                 /* in use */
mkvq_status mkvq_set_isa(const char *name); /* NULL: the best; affects all threads */

/* ---- table handed from one extension module to the other ------------------------------------- */
typedef struct {
    uint32_t version; /* MKVQ_API_VERSION */
    const char *(*status_text)(mkvq_status);
    mkvq_status (*check_codec)(const mkvq_codec *, mkvq_error *);
    int64_t (*record_bound)(const mkvq_codec *);
    mkvq_status (*inspect)(const void *, int64_t, mkvq_record_info *, mkvq_error *);
    mkvq_status (*salience)(const mkvq_salience_args *, mkvq_error *);
    mkvq_status (*pack)(const mkvq_pack_args *, mkvq_error *);
    mkvq_status (*unpack)(const mkvq_unpack_args *, mkvq_error *);
    mkvq_status (*append)(const mkvq_append_args *, mkvq_error *);
    mkvq_status (*attend)(const mkvq_attend_args *, mkvq_error *);
    int64_t (*attend_workspace)(const mkvq_attend_args *);
    void (*set_executor)(mkvq_executor); /* the one that mixkvq._core passes to the core */
    mkvq_executor (*executor)(void);     /* that one, within MIXKVQ_NUM_THREADS; NULL: none */
} mkvq_api;

#ifdef __cplusplus
}
#endif
#endif
