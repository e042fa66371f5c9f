/* plan.c - how an attention of the CPU core is cut into units of work, and the workspace this takes. */
#include "core.h"

/* A unit is a tile of query rows over a run of blocks. Runs exist to give all threads work where
 * there are few heads, and are no shorter than merging them is worth. */
#define ATTEND_UNITS 96
#define RUN_BLOCKS 8

mkvq_attend_plan mkvq_plan_attend(const mkvq_attend_args *a)
{
    const mkvq_history *h = a->history;
    const int64_t rows = a->q.shape[1] / h->kv_heads * a->q.shape[2];
    mkvq_attend_plan plan = {(rows + MKVQ_TILE_ROWS - 1) / MKVQ_TILE_ROWS, 1, 1};
    int64_t most = 0;
    for (int64_t b = 0; b < h->batch; b++)
        most = h->blocks[b] > most ? h->blocks[b] : most;
    const int64_t units = h->batch * h->kv_heads * plan.tiles;
    if (units > 0) {
        const int64_t wanted = (ATTEND_UNITS + units - 1) / units,
                      runs = most / RUN_BLOCKS + (most % RUN_BLOCKS >= RUN_BLOCKS / 2);
        plan.rows = (rows + plan.tiles - 1) / plan.tiles;
        plan.runs = runs < 2 ? 1 : runs < wanted ? runs : wanted;
    }
    return plan;
}

int64_t mkvq_partial_floats(const mkvq_attend_args *a, const mkvq_attend_plan *plan)
{
    return plan->rows * (2 + a->q.shape[3]);
}

int64_t mkvq_attend_workspace(const mkvq_attend_args *args)
{
    const mkvq_history *h = args ? args->history : NULL;
    if (!h || h->kv_heads < 1 || h->batch != args->q.shape[0] || (h->batch && !h->blocks) ||
        args->q.shape[1] < h->kv_heads || mkvq_check_extent(&args->q, "q", NULL) != MKVQ_OK)
        return 0;
    const mkvq_attend_plan plan = mkvq_plan_attend(args);
    return plan.runs == 1 ? 0
                          : h->batch * h->kv_heads * plan.tiles * plan.runs *
                                mkvq_partial_floats(args, &plan) * (int64_t)sizeof(float);
}
