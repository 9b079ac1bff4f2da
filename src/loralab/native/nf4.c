/* NF4 codes of W0 + D from those of W0: models/nf4_grid.py has the same mathematics in torch. */
#include <stdint.h>

#define BLOCK 64 /* weights that share a scale */

static const float LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

/* Between 0 and 1 for each number of a weight: the hash "lowbias32". */
static inline float threshold(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    x ^= x >> 16;
    return (float)(int32_t)(x >> 8) * 0x1p-24f;
}

/* codes and moved (n / 2), two to a byte, the first above; absmax (n / BLOCK), delta (n). */
void nf4_moved(const uint8_t *codes, const float *absmax, const float *delta, uint8_t *moved,
               long n, long seed, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long block = 0; block < n / BLOCK; block++) {
        const uint8_t *bytes = codes + block * BLOCK / 2;
        const float *d = delta + block * BLOCK, a = absmax[block];
        float value[BLOCK];
        int32_t code[BLOCK];
        for (long i = 0; i < BLOCK / 2; i++) {
            value[2 * i] = LEVELS[bytes[i] >> 4];
            value[2 * i + 1] = LEVELS[bytes[i] & 15];
        }
#pragma omp simd
        for (long i = 0; i < BLOCK; i++) {
            float v = value[i] + (a == 0 ? 0 : d[i] / a);
            float low = LEVELS[0], step = LEVELS[1] - LEVELS[0];
            int32_t below = 0;
            for (int k = 1; k < 15; k++) {
                low = v >= LEVELS[k] ? LEVELS[k] : low;
                step = v >= LEVELS[k] ? LEVELS[k + 1] - LEVELS[k] : step;
                below += v >= LEVELS[k];
            }
            uint32_t number = (uint32_t)(block * BLOCK + i) + (uint32_t)seed;
            code[i] = below + (threshold(number) < (v - low) / step);
        }
        uint8_t *out = moved + block * BLOCK / 2;
        for (long i = 0; i < BLOCK / 2; i++) out[i] = (uint8_t)(code[2 * i] << 4 | code[2 * i + 1]);
    }
}
