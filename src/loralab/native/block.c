/* The element-wise steps of a transformer block in bfloat16, one pass over memory each.
 *
 * functions.py and attention.py hold the same mathematics in torch; those are the reference and
 * what runs where this file cannot be compiled. Everything is computed in float and rounded once
 * on the way out, except where the model itself rounds in between. Arrays are dense and row-major.
 * Built without a link to an OpenMP library: the one that torch has loaded already is used, since
 * the threads of two of them would fight for the same cores.
 */
#include "bf16.h"

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* y = (x r) w, r = 1 / sqrt(mean(x^2) + eps); x (n, h), w (h), r (n) is kept for the way back. */
void rms_norm(const bf16 *x, const bf16 *w, bf16 *y, float *r, long n, long h, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++) {
        const bf16 *row = x + i * h;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < h; j++) sum += up(row[j]) * up(row[j]);
        float scale = r[i] = 1.0f / sqrtf(sum / h + eps);
#pragma omp simd
        for (long j = 0; j < h; j++) y[i * h + j] = down(rounded(up(row[j]) * scale) * up(w[j]));
    }
}

/* dx = r (g - x r^2 mean(g x)), g = dy w. */
void rms_norm_backward(const bf16 *dy, const bf16 *x, const bf16 *w, const float *r, bf16 *dx,
                       long n, long h, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++) {
        const bf16 *row = x + i * h, *d = dy + i * h;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < h; j++) sum += up(d[j]) * up(w[j]) * up(row[j]);
        float scale = r[i], along = sum / h * scale * scale;
#pragma omp simd
        for (long j = 0; j < h; j++)
            dx[i * h + j] = down(scale * (up(d[j]) * up(w[j]) - up(row[j]) * along));
    }
}

/* y = silu(gate) up; n numbers each. */
void swiglu(const bf16 *gate, const bf16 *upper, bf16 *y, long n, int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < n; i++) {
        float g = up(gate[i]);
        y[i] = down(rounded(g * sigmoid(g)) * up(upper[i]));
    }
}

void swiglu_backward(const bf16 *dy, const bf16 *gate, const bf16 *upper, bf16 *dgate, bf16 *dupper,
                     long n, int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < n; i++) {
        float g = up(gate[i]), d = up(dy[i]), s = sigmoid(g);
        dupper[i] = down(d * rounded(g * s));
        dgate[i] = down(d * up(upper[i]) * s * (1.0f + g * (1.0f - s)));
    }
}

/* Each head turned by the angles of its token, times scale, and the heads that share a key and
 * value put together: (n, kv, g, d) -> (kv, room, g, d), of which the first n tokens are written. */
void rotate_in(const bf16 *x, const bf16 *c, const bf16 *s, bf16 *out, long n, long room, long kv,
               long g, long d, float scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++)
        for (long k = 0; k < kv; k++)
            for (long m = 0; m < g; m++)
                turn(x + ((i * kv + k) * g + m) * d, c + i * d, s + i * d, d, scale,
                     out + ((k * room + i) * g + m) * d);
}

/* The gradient of rotate_in: (kv, room, g, d) -> (n, kv, g, d). */
void rotate_out(const bf16 *dy, const bf16 *c, const bf16 *s, bf16 *out, long n, long room, long kv,
                long g, long d, float scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++) {
        float head[d];
        for (long k = 0; k < kv; k++)
            for (long m = 0; m < g; m++) {
                const bf16 *a = dy + ((k * room + i) * g + m) * d;
                for (long j = 0; j < d; j++) head[j] = up(a[j]);
                turn_back(head, c + i * d, s + i * d, d, scale,
                          out + ((i * kv + k) * g + m) * d);
            }
    }
}

/* (n, kv, width) -> (kv, room, width), the first n tokens of it, and back. */
void heads_first(const bf16 *x, bf16 *out, long n, long room, long kv, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++)
        for (long k = 0; k < kv; k++)
            memcpy(out + (k * room + i) * width, x + (i * kv + k) * width, width * sizeof(bf16));
}

void heads_last(const bf16 *x, bf16 *out, long n, long room, long kv, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++)
        for (long k = 0; k < kv; k++)
            memcpy(out + (i * kv + k) * width, x + (k * room + i) * width, width * sizeof(bf16));
}

/* Softmax in place over the keys first[i] <= j < last[i] of token i, zero elsewhere; a token that
 * sees none has only zeros.
 * s (kv, t, g, keys): the rows of one token are its g heads. */
void softmax(bf16 *s, const int32_t *first, const int32_t *last, long kv, long t, long g, long keys,
             int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < kv * t * g; row++) {
        int i = row / g % t, a = first[i], b = last[i];
        bf16 *p = s + row * keys;
        float most = -INFINITY, sum = 0, e[keys];
        /* over the whole row, hidden keys too: whole vectors beat ragged ends */
#pragma omp simd reduction(max : most)
        for (int j = 0; j < keys; j++) {
            e[j] = j >= a && j < b ? up(p[j]) : -INFINITY;
            most = e[j] > most ? e[j] : most;
        }
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < keys; j++) {
            e[j] = j >= a && j < b ? exponential(e[j] - most) : 0.0f;
            sum += e[j];
        }
        float scale = sum == 0 ? 0.0f : 1.0f / sum;
#pragma omp simd
        for (int j = 0; j < keys; j++) p[j] = down(e[j] * scale);
    }
}

/* dp = p (dp - sum(p dp)), in place in dp; both (rows, keys). */
void softmax_backward(const bf16 *p, bf16 *dp, long rows, long keys, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const bf16 *a = p + row * keys;
        bf16 *d = dp + row * keys;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < keys; j++) sum += up(a[j]) * up(d[j]);
#pragma omp simd
        for (long j = 0; j < keys; j++) d[j] = down(up(a[j]) * (up(d[j]) - sum));
    }
}

/* The loss of each row of logits z (n, v), which becomes its gradient: softmax(z) - onehot. A row
 * whose label is negative has neither. */
void cross_entropy(bf16 *z, const int64_t *label, float *loss, long n, long v, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++) {
        bf16 *row = z + i * v;
        if (label[i] < 0) {
            memset(row, 0, v * sizeof(bf16));
            loss[i] = 0;
            continue;
        }
        float most = -INFINITY, sum = 0, own = up(row[label[i]]);
#pragma omp simd reduction(max : most)
        for (long j = 0; j < v; j++) most = up(row[j]) > most ? up(row[j]) : most;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < v; j++) sum += exponential(up(row[j]) - most);
        float scale = 1.0f / sum;
        loss[i] = logf(sum) + most - own;
#pragma omp simd
        for (long j = 0; j < v; j++) row[j] = down(exponential(up(row[j]) - most) * scale);
        row[label[i]] = down(exponential(own - most) * scale - 1.0f);
    }
}
