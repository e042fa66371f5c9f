/* pack_unit.inl.h - the units of work of a pack: one block of one head or, where the heads of a row
 * share a budget, of all heads of the row; and the reference that the first coded block sets, until
 * which the blocks of a head are one unit, in order. */
/* One block of one head. */
typedef struct {
    block_source source;
    int64_t unit, index;              /* of the head, of the record */
    const float *importance;          /* [D] or NULL */
    uint8_t *record;                  /* its slot */
    uint16_t half[MKVQ_MAX_HEAD_DIM]; /* mu, in use when the codec has a reference */
    float mu[MKVQ_MAX_HEAD_DIM];
} block_job;

/* The block's reference is known, found now, or not needed: 1; it does not fit: 0. */
static int begin_block(const mkvq_pack_args *a, int64_t row, int64_t head, int64_t block,
                       float *panel, block_job *b)
{
    const mkvq_codec *codec = a->codec;
    const int dim = codec->head_dim, reference = mkvq_has_reference(codec);
    b->source = (block_source){.args = a, .row = row, .head = head};
    b->source.token = a->first[row] + block * codec->block_length;
    b->unit = row * a->k.shape[1] + head, b->index = b->unit * a->max_blocks + block;
    b->importance = a->importance ? a->importance + b->unit * dim : NULL;
    b->record = a->out + b->index * a->out_stride;
    if (!reference)
        return 1;
    if (!a->has_mu[b->unit] && !find_reference(&b->source, panel, b->half, b->mu))
        return 0;
    if (a->has_mu[b->unit]) {
        memcpy(b->half, a->mu + b->unit * dim, (size_t)dim * 2);
        for (int c = 0; c < dim; c++)
            b->mu[c] = mkvq_f16_to_f32(b->half[c]);
    }
    b->source.mu = b->mu;
    return 1;
}

/* Writes the record, exact if `tier` is NULL or nothing else fits. */
static void finish_block(const mkvq_pack_args *a, const uint8_t *tier, float *panel, block_job *b)
{
    int64_t nbytes = tier ? pack_coded(&b->source, tier, panel, b->record) : 0;
    if (nbytes && mkvq_has_reference(a->codec) && !a->has_mu[b->unit]) {
        memcpy(a->mu + b->unit * a->codec->head_dim, b->half, (size_t)a->codec->head_dim * 2);
        a->has_mu[b->unit] = 1;
    }
    if (!nbytes)
        nbytes = pack_exact(&b->source, b->record), b->source.raised = 0;
    a->sizes[b->index] = nbytes;
    if (a->raised)
        a->raised[b->index] = b->source.raised;
}

static void no_record(const mkvq_pack_args *a, int64_t index)
{
    a->sizes[index] = 0;
    if (a->raised)
        a->raised[index] = 0;
}

/* Tier id of every channel; 0 if the block must become an exact record. */
static int choose_block(block_job *b, float *panel, uint8_t *tier)
{
    const mkvq_codec *codec = b->source.args->codec;
    channel_stats stats;
    if (codec->allocate == MKVQ_ALLOCATE_EXACT)
        return 0;
    const int only = only_tier(codec);
    if (only >= 0) {
        memset(tier, only, (size_t)codec->head_dim);
        return 1;
    }
    if (!measure_block(&b->source, panel, &stats))
        return 0;
    return mkvq_has_budget(codec)
               ? choose_within_budget(codec, &stats, b->importance, b->record, tier)
               : choose_tiers(codec, &stats, b->importance, tier);
}

static void pack_head_block(const mkvq_pack_args *a, int64_t row, int64_t head, int64_t block)
{
    float panel[PANEL_FLOATS];
    block_job b;
    uint8_t tier[MKVQ_MAX_HEAD_DIM];
    const int coded = begin_block(a, row, head, block, panel, &b) && choose_block(&b, panel, tier);
    finish_block(a, coded ? tier : NULL, panel, &b);
}

/* All heads of a row: they share one budget, so all are measured before the first is coded. */
static void pack_layer_block(const mkvq_pack_args *a, int64_t row, int64_t block)
{
    const mkvq_codec *codec = a->codec;
    const int64_t heads = a->k.shape[1], stride = a->max_blocks * a->out_stride;
    uint8_t *slots = a->out + (row * heads * a->max_blocks + block) * a->out_stride;
    float panel[PANEL_FLOATS];
    block_job b;
    for (int64_t h = 0; h < heads; h++) {
        channel_stats stats;
        if (begin_block(a, row, h, block, panel, &b) && measure_block(&b.source, panel, &stats))
            start_plan(codec, &stats, b.importance, plan_at(slots, stride, h));
        else
            plan_at(slots, stride, h)->columns = 0;
    }
    spend_budget(codec, slots, stride, heads);
    for (int64_t h = 0; h < heads; h++) {
        const head_plan *plan = plan_at(slots, stride, h);
        const int coded = plan->columns > 0;
        uint8_t tier[MKVQ_MAX_HEAD_DIM];
        if (coded)
            plan_tiers(plan, codec->head_dim, tier);
        begin_block(a, row, h, block, panel, &b);
        finish_block(a, coded ? tier : NULL, panel, &b);
    }
}

/* ---- units ----------------------------------------------------------------------------------- */
/* First head of a unit and, in `end`, the one behind its last: one head, or all of the row. */
static int64_t heads_of_unit(const mkvq_pack_args *a, int64_t head, int64_t *end)
{
    const int all = a->codec->allocate == MKVQ_ALLOCATE_LAYER;
    *end = all ? a->k.shape[1] : head + 1;
    return all ? 0 : head;
}

static void pack_block(const mkvq_pack_args *a, int64_t row, int64_t head, int64_t block)
{
    if (a->codec->allocate == MKVQ_ALLOCATE_LAYER)
        pack_layer_block(a, row, block);
    else
        pack_head_block(a, row, head, block);
}

#define NOT_PACKED (-1) /* in sizes, between the two rounds of a pack with a reference */

/* First round: blocks in order until the reference is known; marks the others. */
static void pack_reference_unit(const mkvq_pack_args *a, int64_t row, int64_t head)
{
    int64_t end, j = 0;
    const int64_t begin = heads_of_unit(a, head, &end), heads = a->k.shape[1];
    for (; j < a->blocks[row]; j++) {
        int known = 1;
        for (int64_t h = begin; h < end; h++)
            known = known && a->has_mu[row * heads + h];
        if (known)
            break;
        pack_block(a, row, head, j);
    }
    for (; j < a->blocks[row]; j++)
        a->sizes[(row * heads + begin) * a->max_blocks + j] = NOT_PACKED;
}

/* Second round: one block, unless the first has packed it. */
static void pack_unit(const mkvq_pack_args *a, int64_t row, int64_t head, int64_t block)
{
    int64_t end;
    const int64_t begin = heads_of_unit(a, head, &end), first = row * a->k.shape[1];
    if (block >= a->blocks[row]) {
        for (int64_t h = begin; h < end; h++)
            no_record(a, (first + h) * a->max_blocks + block);
        return;
    }
    if (!mkvq_has_reference(a->codec) ||
        a->sizes[(first + begin) * a->max_blocks + block] == NOT_PACKED)
        pack_block(a, row, head, block);
}
