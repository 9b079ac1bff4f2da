/* NF4 codes of W0 + B A from those of W0: adapters/nf4_grid.py has the same mathematics in torch. */
#include <stdint.h>
#include <string.h>

#define BLOCK 64 /* weights that share a scale */

static const float LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

/* One over the way to the level above and below, for both weights of a byte; 0 where there is none. */
typedef struct {
    float up[256][2], down[256][2];
} ways;

static void find_ways(ways *to) {
    for (int byte = 0; byte < 256; byte++)
        for (int side = 0; side < 2; side++) {
            int code = side ? byte & 15 : byte >> 4;
            to->up[byte][side] = code < 15 ? 1 / (LEVELS[code + 1] - LEVELS[code]) : 0;
            to->down[byte][side] = code > 0 ? 1 / (LEVELS[code] - LEVELS[code - 1]) : 0;
        }
}

/* Between 0 and 1 for the number of a weight: the hash "lowbias32". */
static inline float threshold(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    x ^= x >> 16;
    return (float)(int32_t)(x >> 8) * 0x1p-24f;
}

/* How many levels a weight goes, however far that is. */
static int32_t far(int code, float unit, float t) {
    float value = LEVELS[code] + unit;
    int below = 0;
    while (below < 14 && value >= LEVELS[below + 1]) below++;
    return below + (t < (value - LEVELS[below]) / (LEVELS[below + 1] - LEVELS[below])) - code;
}

static void move(const uint8_t *bytes, const float *unit, const ways *to, uint32_t first, uint8_t *out) {
    float up[BLOCK], down[BLOCK], t[BLOCK], most = 0;
    int32_t steps[BLOCK];
    for (long i = 0; i < BLOCK / 2; i++) {
        memcpy(up + 2 * i, to->up[bytes[i]], sizeof *to->up);
        memcpy(down + 2 * i, to->down[bytes[i]], sizeof *to->down);
    }
#pragma omp simd reduction(max : most)
    for (long i = 0; i < BLOCK; i++) {
        float u = unit[i], share = u >= 0 ? u * up[i] : -u * down[i];
        t[i] = threshold(first + (uint32_t)i);
        steps[i] = u >= 0 ? (t[i] < share) : -(1.0f - t[i] <= share);
        most = share > most ? share : most;
    }
    if (most > 1)
        for (long i = 0; i < BLOCK; i++)
            steps[i] = far(i & 1 ? bytes[i / 2] & 15 : bytes[i / 2] >> 4, unit[i], t[i]);
    for (long i = 0; i < BLOCK / 2; i++) out[i] = (uint8_t)(bytes[i] + 16 * steps[2 * i] + steps[2 * i + 1]);
}

/* codes and moved (rows, width / 2), two to a byte, the first above; scales (rows, width / BLOCK),
   A (rank, width), B (rows, rank) with the factor of the update in it. */
void nf4_moved(const uint8_t *codes, const float *scales, const float *A, const float *B,
               uint8_t *moved, long rows, long width, long rank, long seed, int threads) {
    ways to;
    find_ways(&to);
#pragma omp parallel for num_threads(threads)
    for (long o = 0; o < rows; o++)
        for (long j = 0; j < width; j += BLOCK) {
            long at = o * width + j;
            float unit[BLOCK] = {0}, scale = scales[at / BLOCK], inverse = scale == 0 ? 0 : 1 / scale;
            for (long r = 0; r < rank; r++) {
                const float b = B[o * rank + r] * inverse, *a = A + r * width + j;
#pragma omp simd
                for (long i = 0; i < BLOCK; i++) unit[i] += b * a[i];
            }
            move(codes + at / 2, unit, &to, (uint32_t)(at + seed), moved + at / 2);
        }
}
