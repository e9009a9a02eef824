/* Attention of one new token in each of several rows, over keys and values that lie where the pool has them, in float32.
 *
 * Keys and values are `[key heads, slots, size]`; a row's are a run of slots. Query heads that share a key head follow one
 * another. Each head is the textbook's: scores, softmax, weighted sum of values; at some hundred tokens all of it stays in
 * the second cache. Knows nothing of Python or torch; `attention_kernel.py` calls it, and checks all sizes.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { LANES = 8 };
typedef float floats __attribute__((vector_size(32), aligned(4)));
typedef int32_t integers __attribute__((vector_size(32), aligned(4)));

static inline float sum_of(floats numbers) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += numbers[i];
    return sum;
}

/* e^x for x up to 0, as in Cephes: a power of two times a polynomial of what is left. Below -87 it is as good as 0. */
static inline floats exponential(floats x) {
    const floats least = (floats){} - 87.0f;
    const integers is_small = x < least;
    x = (floats)(((integers)x & ~is_small) | ((integers)least & is_small));
    const integers power = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, integers);
    const floats whole = __builtin_convertvector(power, floats);
    const floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats sum = 1.9875691500e-4f * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    return (sum * rest * rest + rest + 1.0f) * (floats)((power + 127) << 23);
}

/* `scores` has room for all tokens, rounded up to a multiple of LANES. */
static void attend(const float *query, const float *keys, const float *values, int64_t tokens, int64_t size, float scale,
                   float *scores, float *result) {
    float largest = -INFINITY;
    for (int64_t token = 0; token < tokens; token++) {
        floats sums = {};
        for (int64_t i = 0; i < size; i += LANES)
            sums += *(const floats *)(query + i) * *(const floats *)(keys + token * size + i);
        scores[token] = sum_of(sums) * scale;
        largest = scores[token] > largest ? scores[token] : largest;
    }
    const int64_t rounded_up = (tokens + LANES - 1) / LANES * LANES;
    for (int64_t token = tokens; token < rounded_up; token++) scores[token] = largest;
    floats totals = {};
    for (int64_t token = 0; token < rounded_up; token += LANES) {
        const floats weights = exponential(*(floats *)(scores + token) - largest);
        *(floats *)(scores + token) = weights;
        totals += weights;
    }
    const float inverse = 1 / (sum_of(totals) - (float)(rounded_up - tokens)); /* those that are no tokens have weight 1 */
    for (int64_t i = 0; i < size; i++) result[i] = 0;
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t i = 0; i < size; i += LANES)
            *(floats *)(result + i) += *(const floats *)(values + token * size + i) * (scores[token] * inverse);
}

/* `queries` and `results: [rows, heads, size]`. Returns whether there was no memory for the scores. */
int attend_rows(const float *queries, int64_t rows, int64_t heads, int64_t key_heads, int64_t size, const float *keys,
                const float *values, int64_t slots, const int64_t *first_slots, const int64_t *tokens, float scale,
                float *results, int threads) {
    const int64_t heads_a_key = heads / key_heads;
    int is_short_of_memory = 0;
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t unit = 0; unit < rows * key_heads; unit++) {
        const int64_t row = unit / key_heads, key_head = unit % key_heads;
        const int64_t start = (key_head * slots + first_slots[row]) * size;
        float *scores = malloc((size_t)(tokens[row] + LANES) * sizeof(float));
        for (int64_t head = 0; head < heads_a_key && scores; head++) {
            const int64_t at = (row * heads + key_head * heads_a_key + head) * size;
            attend(queries + at, keys + start, values + start, tokens[row], size, scale, scores, results + at);
        }
        if (!scores) is_short_of_memory = 1;
        free(scores);
    }
    return is_short_of_memory;
}
