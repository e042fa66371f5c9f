/* pack_unit.inl.h - the units of work of a pack: all blocks of one head in order or, where the heads
 * of a row share a budget, of all heads of a row; and the reference that the first coded block sets. */
/* One block of one head. */
typedef struct {
    block_source source;
    int64_t unit, index;              /* of the head, of the record */
    const float *importance;          /* [D] or NULL */
    uint8_t *record;                  /* its slot */
    uint16_t half[MKVQ_MAX_HEAD_DIM]; /* mu, in use when the codec has a reference */
    float mu[MKVQ_MAX_HEAD_DIM];
} block_job;

static int has_reference(const mkvq_codec *codec)
{
    return codec->key_reference && codec->allocate != MKVQ_ALLOCATE_EXACT;
}

/* The block's reference is known, found now, or not needed: 1; it does not fit: 0. */
static int begin_block(const mkvq_pack_args *a, int64_t row, int64_t head, int64_t block,
                       float *panel, block_job *b)
{
    const mkvq_codec *codec = a->codec;
    const int dim = codec->head_dim, reference = has_reference(codec);
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
    if (nbytes && has_reference(a->codec) && !a->has_mu[b->unit]) {
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

static void pack_unit(const mkvq_pack_args *a, int64_t row, int64_t head)
{
    float panel[PANEL_FLOATS];
    for (int64_t j = 0; j < a->max_blocks; j++) {
        block_job b;
        uint8_t tier[MKVQ_MAX_HEAD_DIM];
        if (j >= a->blocks[row]) {
            no_record(a, (row * a->k.shape[1] + head) * a->max_blocks + j);
            continue;
        }
        const int coded = begin_block(a, row, head, j, panel, &b) && choose_block(&b, panel, tier);
        finish_block(a, coded ? tier : NULL, panel, &b);
    }
}

/* All heads of a row: they share one budget, so all are measured before the first is coded. */
static void pack_layer_unit(const mkvq_pack_args *a, int64_t row)
{
    const mkvq_codec *codec = a->codec;
    const int64_t heads = a->k.shape[1], stride = a->max_blocks * a->out_stride;
    float panel[PANEL_FLOATS];
    for (int64_t j = 0; j < a->max_blocks; j++) {
        uint8_t *slots = a->out + (row * heads * a->max_blocks + j) * a->out_stride;
        block_job b;
        for (int64_t h = 0; h < heads; h++) {
            channel_stats stats;
            if (j >= a->blocks[row])
                no_record(a, (row * heads + h) * a->max_blocks + j);
            else if (begin_block(a, row, h, j, panel, &b) &&
                     measure_block(&b.source, panel, &stats))
                start_plan(codec, &stats, b.importance, plan_at(slots, stride, h));
            else
                plan_at(slots, stride, h)->columns = 0;
        }
        if (j >= a->blocks[row])
            continue;
        spend_budget(codec, slots, stride, heads);
        for (int64_t h = 0; h < heads; h++) {
            const head_plan *plan = plan_at(slots, stride, h);
            const int coded = plan->columns > 0;
            uint8_t tier[MKVQ_MAX_HEAD_DIM];
            if (coded)
                plan_tiers(plan, codec->head_dim, tier);
            begin_block(a, row, h, j, panel, &b);
            finish_block(a, coded ? tier : NULL, panel, &b);
        }
    }
}
