/* budget.inl.h - key bits under a budget of stored columns, of one head or pooled over the heads of
 * a layer.
 *
 * A channel's hull lists the steps to higher tiers that pay, with falling gain (cost saved per bit).
 * Every head keeps its channels in a heap by the gain of their next step; taking the best step of
 * all heads again and again takes the steps of all channels in sorted order. What this needs of a
 * head, its plan, lies in the slot of the record until that is written: 32 bytes per channel and 32
 * more, where the smallest slot has 128 per channel. */
typedef struct {
    float gain[MKVQ_TIER_EXACT - 1]; /* of each step, strictly falling */
    uint8_t tier[MKVQ_TIER_EXACT];   /* the first one, then where each step leads */
    uint8_t steps, done;
} channel_hull;

typedef struct {
    int32_t counts[MKVQ_TIERS];
    int32_t columns; /* that the tiers so far need; 0: the head takes no part */
    int32_t open;    /* channels in the heap */
    channel_hull hull[];
} head_plan;

typedef char
    head_plan_fits_its_slot[sizeof(head_plan) == 32 && sizeof(channel_hull) == 24 ? 1 : -1];

MKVQ_FN head_plan *plan_at(uint8_t *slots, int64_t stride, int64_t head)
{
    return (head_plan *)(void *)(slots + head * stride);
}

/* [dim] keys: upper half the bits of the gain, which order like the gain; lower half falls with the
 * channel. */
MKVQ_FN uint64_t *heap_of(head_plan *plan, int dim)
{
    return (uint64_t *)(void *)&plan->hull[dim];
}

MKVQ_FN int channel_of(uint64_t key)
{
    return (int)(UINT32_MAX - (uint32_t)key);
}

MKVQ_FN uint64_t step_key(const channel_hull *h, int channel)
{
    return (uint64_t)mkvq_bits(h->gain[h->done]) << 32 | (UINT32_MAX - (uint32_t)channel);
}

MKVQ_FN int columns_of(const int32_t *counts)
{
    return (counts[MKVQ_TIER_8] + 3) / 4 + (counts[MKVQ_TIER_4] + 7) / 8 +
           (counts[MKVQ_TIER_3] + counts[MKVQ_TIER_2] + 15) / 16 +
           (counts[MKVQ_TIER_3] + counts[MKVQ_TIER_1] + 31) / 32;
}

/* The lower convex hull of (bits, cost); 0 if no tier has a finite cost. */
MKVQ_FN int find_hull(const float *error, float weight, channel_hull *h)
{
    float cost[MKVQ_TIER_EXACT];
    int n = 0; /* points kept */
    for (int t = 0; t < MKVQ_TIER_EXACT; t++) {
        const float c = weight * error[t];
        if (error[t] == NO_FIT || !(c < INFINITY))
            continue;
        if (n > 0 && !(c < cost[n - 1]))
            continue;
        float gain = 0.0f;
        for (; n > 0; n--) {
            gain = (cost[n - 1] - c) / (float)(mkvq_tier_bits(t) - mkvq_tier_bits(h->tier[n - 1]));
            if (n == 1 || gain < h->gain[n - 2])
                break;
        }
        if (n > 0)
            h->gain[n - 1] = gain;
        cost[n] = c, h->tier[n++] = (uint8_t)t;
    }
    h->steps = (uint8_t)(n > 0 ? n - 1 : 0), h->done = 0;
    return n > 0;
}

MKVQ_FN void sift_down(uint64_t *heap, int n, int i)
{
    const uint64_t key = heap[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        child += child + 1 < n && heap[child + 1] > heap[child];
        if (heap[child] < key)
            break;
        heap[i] = heap[child];
    }
    heap[i] = key;
}

/* All channels at their first tier; takes no part if a channel has none. */
MKVQ_FN void start_plan(const mkvq_codec *codec, const channel_stats *stats,
                        const float *importance, head_plan *plan)
{
    const int dim = codec->head_dim;
    uint64_t *heap = heap_of(plan, dim);
    memset(plan, 0, sizeof *plan);
    for (int c = 0; c < dim; c++) {
        channel_hull *h = &plan->hull[c];
        float error[MKVQ_TIER_EXACT];
        for (int t = 0; t < MKVQ_TIER_EXACT; t++)
            error[t] = channel_error(codec, stats, c, t);
        if (!find_hull(error, importance ? importance[c] * importance[c] : 1.0f, h))
            return;
        plan->counts[h->tier[0]]++;
        if (h->steps)
            heap[plan->open++] = step_key(h, c);
    }
    for (int i = plan->open / 2 - 1; i >= 0; i--)
        sift_down(heap, plan->open, i);
    plan->columns = columns_of(plan->counts);
}

/* Takes the head's best step if it needs at most `room` more columns, and returns 1. */
MKVQ_FN int take_step(head_plan *plan, int dim, int64_t *room)
{
    uint64_t *heap = heap_of(plan, dim);
    const int c = channel_of(heap[0]);
    channel_hull *h = &plan->hull[c];
    plan->counts[h->tier[h->done]]--;
    plan->counts[h->tier[h->done + 1]]++;
    const int columns = columns_of(plan->counts), more = columns - plan->columns;
    if (more > *room)
        return 0;
    *room -= more, plan->columns = columns;
    heap[0] = ++h->done < h->steps ? step_key(h, c) : heap[--plan->open];
    sift_down(heap, plan->open, 0);
    return 1;
}

/* Spends the budget on the heads that take part; if not even their start fits, none does. */
MKVQ_FN void spend_budget(const mkvq_codec *codec, uint8_t *slots, int64_t stride, int64_t heads)
{
    int64_t room = 0;
    for (int64_t i = 0; i < heads; i++) {
        const int columns = plan_at(slots, stride, i)->columns;
        room += columns ? codec->budget_columns - columns : 0;
    }
    for (int64_t i = 0; room < 0 && i < heads; i++)
        plan_at(slots, stride, i)->columns = 0;
    while (room >= 0) {
        head_plan *best = NULL;
        uint32_t gain = 0;
        for (int64_t i = 0; i < heads; i++) {
            head_plan *plan = plan_at(slots, stride, i);
            const uint32_t next = plan->columns && plan->open
                                      ? (uint32_t)(heap_of(plan, codec->head_dim)[0] >> 32)
                                      : 0;
            if (plan->columns && plan->open && (!best || next > gain))
                best = plan, gain = next;
        }
        if (!best || !take_step(best, codec->head_dim, &room))
            return;
    }
}

MKVQ_FN void plan_tiers(const head_plan *plan, int dim, uint8_t *tier)
{
    for (int c = 0; c < dim; c++)
        tier[c] = plan->hull[c].tier[plan->hull[c].done];
}

/* Tier id of every channel of one head within its own budget; 0 if it cannot be coded. */
MKVQ_FN int choose_within_budget(const mkvq_codec *codec, const channel_stats *stats,
                                 const float *importance, uint8_t *slot, uint8_t *tier)
{
    head_plan *plan = plan_at(slot, 0, 0);
    start_plan(codec, stats, importance, plan);
    spend_budget(codec, slot, 0, 1);
    if (plan->columns)
        plan_tiers(plan, codec->head_dim, tier);
    return plan->columns > 0;
}
