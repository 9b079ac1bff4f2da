/* One pass of a Llama-like model over tokens of many requests, each with its own adapter.
 *
 * Every token has a place in a request; keys and values lie in blocks of 16 places that the
 * requests share (block tables). A step is memory traffic: each weight is read once for all tokens,
 * in the layout that torch keeps it in, and an adapter's A and B only for its own tokens, whatever
 * the ranks of others. Sums are in float and are rounded where the model's own code rounds.
 *
 * Axes: n tokens, h hidden, f inner, heads, groups (key heads), d numbers a head, r rank.
 */
#include "token.h"
#include <stdlib.h>

#ifdef __AVX512BF16__

enum { TOKENS = 32 }; /* of one adapter at a time */

/* What serving/runners/native.py passes, in the same order. */
typedef struct {
    int64_t layers, h, f, heads, groups, d, vocabulary;
    double eps, scale;
    const bf16 *const *weights; /* (layers, 12): norms, projections and biases, as below */
    const bf16 *final_norm, *head;
    bf16 *keys, *values; /* (layers, blocks, PLACES, groups, d) */
    int64_t blocks;
} model;

enum { NORM, Q, K, V, BQ, BK, BV, O, NORM2, GATE, UP, DOWN, WEIGHTS };

/* One projection of one adapter; what is absent is NULL. */
typedef struct {
    const bf16 *a;      /* (r, in) */
    const uint32_t *b;  /* (out / 64, r / 2, 64): pairs of neighbours in r, with the scaling in them */
    const float *ratio; /* (out), of DoRA: before the bias */
    const float *after; /* (out), of (IA)3: of the output, bias included */
    const float *before; /* (in), of (IA)3: of the input */
    int64_t r;          /* a multiple of 4: the rest is zero */
} update;

enum { UQ, UK, UV, UO, UGATE, UUP, UDOWN, UPDATES };

typedef struct {
    int64_t n, spans, width, m;
    bf16 *x;                 /* (n, h): embedded tokens; overwritten */
    const bf16 *cos, *sin;   /* (n, d) */
    const int32_t *place;    /* (n) */
    const int32_t *request;  /* (n): row of the tables */
    const int32_t *tables;   /* (requests, width): numbers of blocks */
    const int64_t *span;     /* (spans, 3): start, stop, adapter or -1 */
    const update *const *adapters; /* each (layers, UPDATES) */
    const int64_t *asked;    /* (m): tokens whose logits are wanted */
    float *logits;           /* (m, vocabulary) */
} batch;

typedef struct { int64_t start, stop; const update *u; } piece; /* some tokens of one adapter */

/* What all threads of a step know, and which of them this one is. */
typedef struct {
    const model *m;
    const batch *b;
    const update **own; /* (n): a token's adapter, or NULL */
    const piece *pieces;
    bf16 *low;       /* (3, n, ranks): x A' for up to three projections of the same x */
    long count, ranks, in[UPDATES], out[UPDATES];
    int thread, threads;
} step;

static const int weight_of[] = {Q, K, V, O, GATE, UP, DOWN}, slot_of[] = {0, 1, 2, 0, 0, 1, 0};

/* The share of a thread, in steps of 16. */
static inline void share(const step *s, long size, long *from, long *to) {
    long steps = (size + 15) / 16;
    *from = steps * s->thread / s->threads * 16;
    *to = steps * (s->thread + 1) / s->threads * 16;
    if (*to > size) *to = size;
}

/* Where this thread begins to read a projection; what follows the last one of all is the head. */
static const bf16 *start_of(const step *s, long layer, int which) {
    long from, to;
    if (which == UPDATES) layer++, which = 0;
    int head = layer == s->m->layers;
    share(s, head ? s->m->vocabulary : s->out[which], &from, &to);
    return head ? s->m->head + from * s->m->h
                : s->m->weights[layer * WEIGHTS + weight_of[which]] + from * s->in[which];
}

/* low = x A' of a few tokens, for up to 16 ranks, a multiple of 4. */
static void lower_some(const bf16 *x, long n, const bf16 *a, long in, int ranks, bf16 *low,
                       long ldl) {
    float out[16];
    for (long i = 0, mr; i < n; i += mr) {
        mr = n - i >= 4 ? 4 : 1;
        for (int j = 0, no; j < ranks; j += no) {
            no = mr == 1 && ranks == 16 ? 16 : 4;
            if (mr == 4)
                meet(4, 4, x + i * in, a + j * in, in, out);
            else if (no == 4)
                meet(1, 4, x + i * in, a + j * in, in, out);
            else
                meet(1, 16, x + i * in, a + j * in, in, out);
            for (int k = 0; k < mr * no; k++)
                low[(i + k / no) * ldl + j + k % no] = down(out[k]);
        }
    }
}

/* The lower halves of some projections of the same tokens, 16 ranks at a time, the threads in turn. */
static void lower(const step *s, long layer, int first, int last, const bf16 *x) {
    long turn = 0, in = s->in[first];
    for (int which = first; which <= last; which++)
        for (const piece *p = s->pieces; p < s->pieces + s->count; p++) {
            const update *u = p->u + layer * UPDATES + which;
            bf16 *low = s->low + ((which - first) * s->b->n + p->start) * s->ranks;
            for (long r = 0; r < u->r; r += 16)
                if (turn++ % s->threads == s->thread)
                    lower_some(x + p->start * in, p->stop - p->start, u->a + r * in, in,
                               u->r - r < 16 ? (int)(u->r - r) : 16, low + r, s->ranks);
        }
    if (s->count) {
#pragma omp barrier
    }
}

/* y += low B for 16 nb columns of mr tokens. */
static inline __attribute__((always_inline)) void lift_block(
    int mr, int nb, const update *u, const bf16 *low, long ldl, const uint32_t *b, long width,
    float *y, long step) {
    __m512 sum[16];
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nb; j++) sum[i * nb + j] = _mm512_loadu_ps(y + j * step + 16 * i);
    accumulate(mr, nb, u->r / 2, (const uint32_t *)low, ldl / 2, 1, b, width, 16, sum);
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nb; j++) _mm512_storeu_ps(y + j * step + 16 * i, sum[i * nb + j]);
}

/* The same for some columns of a few tokens; in B each 64 columns lie together. */
static void lift(const bf16 *low, long ldl, long n, const update *u, long out, long from, long to,
                 float *y, long step) {
    for (long c = from, nb; c < to; c += 16 * nb) {
        long base = c / 64 * 64, width = out - base < 64 ? out - base : 64;
        const uint32_t *b = u->b + base * (u->r / 2) + c - base;
        nb = c == base && width == 64 && to - c >= 64 ? 4 : 1;
        for (long i = 0, mr; i < n; i += mr) {
            const bf16 *own = low + i * ldl;
            float *at = y + c / 16 * step + i * 16;
            mr = n - i >= 4 ? 4 : 1;
            if (mr == 4 && nb == 4)
                lift_block(4, 4, u, own, ldl, b, width, at, step);
            else if (mr == 4)
                lift_block(4, 1, u, own, ldl, b, width, at, step);
            else if (nb == 4)
                lift_block(1, 4, u, own, ldl, b, width, at, step);
            else
                lift_block(1, 1, u, own, ldl, b, width, at, step);
        }
    }
}

/* A thread's columns of y = x W', and what the adapters and the bias make of them. */
static void project(const step *s, long layer, int which, const tokens *x, float *y) {
    const bf16 *const *w = s->m->weights + layer * WEIGHTS;
    const bf16 *bias = which <= UV ? w[BQ + which] : NULL;
    long from, to, n = s->b->n, out = s->out[which];
    share(s, out, &from, &to);
    dense(x, w[weight_of[which]], from, to, start_of(s, layer, which + 1), y, 16, n * 16);
    for (const piece *p = s->pieces; p < s->pieces + s->count; p++) {
        const update *u = p->u + layer * UPDATES + which;
        if (u->r)
            lift(s->low + (slot_of[which] * n + p->start) * s->ranks, s->ranks, p->stop - p->start,
                 u, out, from, to, y + p->start * 16, n * 16);
    }
    for (long i = 0; i < n; i++) {
        const update *u = s->own[i] ? s->own[i] + layer * UPDATES + which : NULL;
        if (!(bias || (u && (u->ratio || u->after)))) continue;
        for (long c = from; c < to; c += 16) {
            float *own = y + c * n + i * 16;
            for (int k = 0; u && u->ratio && k < 16; k++) own[k] *= u->ratio[c + k];
            for (int k = 0; bias && k < 16; k++) own[k] += up(bias[c + k]);
            for (int k = 0; u && u->after && k < 16; k++)
                own[k] = rounded(own[k]) * u->after[c + k];
        }
    }
}

/* `count` outputs of a token, from those in blocks of n tokens. */
static inline void gather(const float *y, long n, long count, float *row) {
    for (long c = 0; c < count; c += 16)
        _mm512_storeu_ps(row + c, _mm512_loadu_ps(y + c * n));
}

static void *space(long bytes) { return aligned_alloc(64, full(bytes + 64, 64)); }

/* Adapters' spans cut into pieces, and the adapter of each token. */
static long cut(const batch *b, piece *pieces, const update **own) {
    long count = 0;
    for (long s = 0; s < b->spans; s++) {
        const int64_t *span = b->span + 3 * s;
        const update *u = span[2] < 0 ? NULL : b->adapters[span[2]];
        for (long i = span[0]; i < span[1]; i++) own[i] = u;
        for (long i = span[0]; u && i < span[1]; i += TOKENS)
            pieces[count++] = (piece){i, span[1] - i < TOKENS ? span[1] : i + TOKENS, u};
    }
    return count;
}

static long most_ranks(const step *s) {
    long most = 4;
    for (const piece *p = s->pieces; p < s->pieces + s->count; p++)
        for (long i = 0; i < s->m->layers * UPDATES; i++) most = p->u[i].r > most ? p->u[i].r : most;
    return most;
}

/* A token's queries, keys and values turned, and the latter two put into their places. */
static void place_token(const step *s, long layer, long i, const float *row, bf16 *q) {
    const model *m = s->m;
    const batch *b = s->b;
    long d = m->d, wide_q = m->heads * d, wide_k = m->groups * d, at = b->place[i];
    long block = (b->tables + b->request[i] * b->width)[at / PLACES];
    long offset = ((layer * m->blocks + block) * PLACES + at % PLACES) * wide_k;
    const bf16 *c = b->cos + i * d, *sine = b->sin + i * d;
    for (long j = 0; j < m->heads; j++) turned(row + j * d, c, sine, d, q + i * wide_q + j * d);
    for (long j = 0; j < m->groups; j++)
        turned(row + wide_q + j * d, c, sine, d, m->keys + offset + j * d);
    for (long j = 0; j < wide_k; j++) m->values[offset + j] = down(row[wide_q + wide_k + j]);
}

static void packed(const tokens *x) {
#ifdef TILES
    if (x->pairs) pack(x);
#endif
    (void)x;
}

/* What a projection has given is added to every token, and the sum normed for what comes next. */
static void settle_all(const step *s, const float *y, const bf16 *weight, float *row, bf16 *normed) {
    long n = s->b->n, h = s->m->h;
#pragma omp barrier
#pragma omp for schedule(static)
    for (long i = 0; i < n; i++) {
        gather(y + i * 16, n, h, row);
        settle(s->b->x + i * h, row, h, weight, (float)s->m->eps, normed + i * h);
    }
}

/* A thread's part of all layers, and of the head. */
static void run(step *s, tokens *normed, tokens *seen, tokens *inner, tokens *asked, bf16 *q,
                float *y, float *row, float *scores, long room) {
    const model *m = s->m;
    const batch *b = s->b;
    long n = b->n, h = m->h, f = m->f, d = m->d, size = m->heads / m->groups, from, to;
    long wide_q = m->heads * d, wide_k = m->groups * d, all = wide_q + 2 * wide_k;
    float eps = (float)m->eps;
    bf16 *x = (bf16 *)normed->rows, *looked = (bf16 *)seen->rows, *gated = (bf16 *)inner->rows;
#pragma omp for schedule(static)
    for (long i = 0; i < n; i++) norm(b->x + i * h, m->weights[NORM], h, eps, x + i * h);
    for (long layer = 0; layer < m->layers; layer++) {
        const bf16 *const *w = m->weights + layer * WEIGHTS;
        const bf16 *next = layer + 1 < m->layers ? w[WEIGHTS + NORM] : m->final_norm;
        const bf16 *keys = m->keys + layer * m->blocks * PLACES * wide_k;
        const bf16 *values = m->values + layer * m->blocks * PLACES * wide_k;
        packed(normed);
        lower(s, layer, UQ, UV, x);
        project(s, layer, UQ, normed, y);
        project(s, layer, UK, normed, y + wide_q * n);
        project(s, layer, UV, normed, y + (wide_q + wide_k) * n);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++) {
            gather(y + i * 16, n, all, row);
            place_token(s, layer, i, row, q);
        }
#pragma omp for schedule(dynamic, n < 4 * s->threads ? 1 : m->groups)
        for (long i = 0; i < n * m->groups; i++) {
            long token = i / m->groups, group = i % m->groups;
            attend(q + token * wide_q + group * size * d, keys + group * d, values + group * d, wide_k,
                   size, d, (float)m->scale, b->tables + b->request[token] * b->width,
                   b->place[token] + 1, looked + token * wide_q + group * size * d, scores, room);
        }
        packed(seen);
        lower(s, layer, UO, UO, looked);
        project(s, layer, UO, seen, y);
        settle_all(s, y, w[NORM2], row, x);
        packed(normed);
        lower(s, layer, UGATE, UUP, x);
        project(s, layer, UGATE, normed, y);
        project(s, layer, UUP, normed, y + f * n);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < n * 4; i++) {
            const update *u = s->own[i / 4] ? s->own[i / 4] + layer * UPDATES + UDOWN : NULL;
            long start = f / 32 * (i % 4) / 4 * 32, stop = f / 32 * (i % 4 + 1) / 4 * 32;
            const float *own = y + start * n + i / 4 * 16;
            gather(own, n, stop - start, row);
            gather(own + f * n, n, stop - start, row + f);
            gate_token(row, row + f, u && u->before ? u->before + start : NULL, stop - start,
                       gated + i / 4 * f + start);
        }
        packed(inner);
        lower(s, layer, UDOWN, UDOWN, gated);
        project(s, layer, UDOWN, inner, y);
        settle_all(s, y, next, row, x);
    }
    /* the asked rows side by side, so that the head is read once */
#pragma omp for schedule(static)
    for (long i = 0; i < b->m; i++) memcpy(b->x + i * h, x + b->asked[i] * h, 2 * h);
    packed(asked);
    share(s, m->vocabulary, &from, &to);
    dense(asked, m->head, from, to, NULL, b->logits, m->vocabulary, 16);
}

/* All of a step: the tokens through every layer, keys and values kept, logits of those asked. */
void llama_step(const model *m, const batch *b, int threads) {
    long n = b->n, h = m->h, f = m->f, d = m->d, room = b->width * PLACES;
    long wide_q = m->heads * d, wide_k = m->groups * d, all = wide_q + 2 * wide_k;
    long widest = all > 2 * f ? all : 2 * f, deepest = wide_q > f ? wide_q : f;
    piece *pieces = malloc((n + 1) * sizeof(piece));
    const update **own = malloc((n + 1) * sizeof(*own));
    step common = {
        .m = m, .b = b, .own = own, .pieces = pieces, .count = cut(b, pieces, own),
        .in = {h, h, h, wide_q, h, h, f}, .out = {wide_q, wide_k, wide_k, h, f, f, h}};
    common.ranks = most_ranks(&common);
    uint32_t *pairs = tiles_allowed() ? space(full(n, 16) * (deepest > h ? deepest : h) * 2) : NULL;
    bf16 *q = space(n * wide_q * 2);
    float *y = space(n * widest * 4);
    tokens normed = {space(n * h * 2), pairs, n, h}, seen = {space(n * wide_q * 2), pairs, n, wide_q};
    tokens inner = {space(n * f * 2), pairs, n, f}, asked = {b->x, pairs, b->m, h};
    common.low = space(common.count ? 3 * n * common.ranks * 2 : 64);
#pragma omp parallel num_threads(threads)
    {
        step s = common;
        float *scores = malloc(4 * (m->heads / m->groups) * (room + PLACES));
        float *row = malloc(4 * widest);
        s.thread = 0, s.threads = 1;
#ifdef _OPENMP
        extern int omp_get_thread_num(void), omp_get_num_threads(void);
        s.thread = omp_get_thread_num(), s.threads = omp_get_num_threads();
#endif
#ifdef TILES
        tile_shapes before;
        if (pairs) open_tiles(&before);
#endif
        run(&s, &normed, &seen, &inner, &asked, q, y, row, scores, room);
#ifdef TILES
        if (pairs) close_tiles(&before);
#endif
        free(scores), free(row);
    }
    free((void *)normed.rows), free((void *)seen.rows), free((void *)inner.rows);
    free(pairs), free(q), free(y), free(common.low), free(pieces), free(own);
}

#endif
