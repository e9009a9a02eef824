/* Linear layers with int8 or nf4 weights on x86 processors with AVX2: quantizing them, and multiplying by them.
 *
 * The weights are laid out as bitsandbytes does: a row for each output; nf4 packs two weights into a byte, the first
 * into the high half, and has a scale for each 64 weights of a row; int8 has one scale for each row.
 *
 * A row of states is rounded to 16 bits, with a scale of its own for each 64 numbers, so that a row's result depends on
 * nothing but that row, and rounding costs no more than float16 would. `maddwd` then multiplies 16 pairs of integers
 * and adds them up by twos; with nf4's values in 14 bits, the eight products that meet in 32 bits fit.
 *
 * Knows nothing of Python or torch; `quantized_kernel.py` compiles and calls it, and checks all sizes.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

enum { BLOCK = 64, LANES = 16, ROWS_AT_ONCE = 4, OUTPUTS_IN_CACHE = 16, MAX_STEP = 32767, MAX_CODE = 8191 };
enum { PREFETCHED_BYTES = 2048 }; /* ahead of the weights in use: a single row is 14 % faster than without */

const float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

/* The largest size of a number. Bits of floats without their sign are ordered as the floats are, NaNs on top. */
static inline float largest_of(const float *numbers, int64_t count) {
    union { int32_t bits; float number; } largest = {0}, size;
    for (int64_t i = 0; i < count; i++) {
        size.number = __builtin_fabsf(numbers[i]);
        largest.bits = size.bits > largest.bits ? size.bits : largest.bits;
    }
    return largest.number;
}

void nf4_quantize(const float *weights, int64_t num_blocks, uint8_t *packed, float *scales, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < num_blocks; block++) {
        const float *block_weights = weights + block * BLOCK;
        int32_t codes[BLOCK];
        float scale = largest_of(block_weights, BLOCK), inverse = 1 / __builtin_fmaxf(scale, 1e-38f);
        for (int i = 0; i < BLOCK; i++) {
            codes[i] = 0;
            for (int code = 0; code < 15; code++)
                codes[i] += block_weights[i] * inverse > (NF4[code] + NF4[code + 1]) / 2;
        }
        for (int i = 0; i < BLOCK; i += 2) packed[(block * BLOCK + i) / 2] = (uint8_t)(codes[i] << 4 | codes[i + 1]);
        scales[block] = scale;
    }
}

void int8_quantize(const float *weights, int64_t inputs, int64_t outputs, int8_t *steps, float *scales, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t output = 0; output < outputs; output++) {
        const float *row = weights + output * inputs;
        scales[output] = largest_of(row, inputs);
        float inverse = scales[output] > 0 ? 1 / scales[output] * 127 : 0; /* rounded twice, as bitsandbytes does */
        for (int64_t i = 0; i < inputs; i++) steps[output * inputs + i] = (int8_t)__builtin_rintf(row[i] * inverse);
    }
}

/* In the order in which a block's weights are unpacked: of nf4, those in the high halves of bytes first, and of these,
 * those in the first eight bytes of both halves of a register. */
static inline void round_states(const float *states, int64_t num_blocks, int16_t *steps, float *scales, int is_nf4) {
    for (int64_t block = 0; block < num_blocks; block++, states += BLOCK, steps += BLOCK) {
        float largest = largest_of(states, BLOCK), inverse = largest > 0 ? MAX_STEP / largest : 0;
        int16_t in_order[BLOCK];
        for (int i = 0; i < BLOCK; i++) in_order[i] = (int16_t)(int32_t)__builtin_rintf(states[i] * inverse);
        for (int i = 0; i < BLOCK; i++) {
            int lane = i % LANES, byte = lane + lane / 8 * 8 + i / LANES % 2 * 8;
            steps[i] = in_order[is_nf4 ? 2 * byte + i / (2 * LANES) : i];
        }
        scales[block] = largest / MAX_STEP; /* infinity or NaN where one was among the states, and so is the result */
    }
}

static inline float sum_of(__m256 numbers) {
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps(numbers, 1));
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
}

struct codebook {
    __m256i low_bytes, high_bytes; /* of the values of nf4 times MAX_CODE */
};

static inline __attribute__((always_inline)) void unpack(
    const uint8_t *source, const int is_nf4, const struct codebook *codebook, __m256i weights[4]) {
    _mm_prefetch((const char *)source + PREFETCHED_BYTES, _MM_HINT_T0);
    if (!is_nf4) {
        for (int i = 0; i < 4; i++)
            weights[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(source + i * LANES)));
        return;
    }
    const __m256i low_half = _mm256_set1_epi8(15), packed = _mm256_loadu_si256((const __m256i *)source);
    for (int i = 0; i < 2; i++) {
        const __m256i codes = _mm256_and_si256(i ? packed : _mm256_srli_epi16(packed, 4), low_half);
        const __m256i low = _mm256_shuffle_epi8(codebook->low_bytes, codes);
        const __m256i high = _mm256_shuffle_epi8(codebook->high_bytes, codes);
        weights[2 * i] = _mm256_unpacklo_epi8(low, high);
        weights[2 * i + 1] = _mm256_unpackhi_epi8(low, high);
    }
}

/* One output of up to ROWS_AT_ONCE rows; the weights are unpacked once for all of them. */
static inline __attribute__((always_inline)) void multiply_rows(
    const int num_rows, const int is_nf4, int64_t num_blocks, const uint8_t *weights, const float *weight_scales,
    const struct codebook *codebook, const int16_t *steps, const float *scales, float factor, float bias,
    float *results, int64_t results_stride) {
    __m256 sums[ROWS_AT_ONCE];
    for (int row = 0; row < num_rows; row++) sums[row] = _mm256_setzero_ps();
    for (int64_t block = 0; block < num_blocks; block++) {
        __m256i unpacked[4];
        unpack(weights + block * (is_nf4 ? BLOCK / 2 : BLOCK), is_nf4, codebook, unpacked);
        for (int row = 0; row < num_rows; row++) {
            const __m256i *state = (const __m256i *)(steps + (row * num_blocks + block) * BLOCK);
            __m256i products[4];
            for (int i = 0; i < 4; i++) products[i] = _mm256_madd_epi16(unpacked[i], _mm256_loadu_si256(state + i));
            const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(products[0], products[1]),
                                                 _mm256_add_epi32(products[2], products[3]));
            const float scale = scales[row * num_blocks + block] * (is_nf4 ? weight_scales[block] : 1);
            sums[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale), sums[row]);
        }
    }
    for (int row = 0; row < num_rows; row++) results[row * results_stride] = sum_of(sums[row]) * factor + bias;
}

/* Rows in groups, outputs in groups whose weights stay in the cache for all rows. 0, or 1 where memory is short. */
static inline __attribute__((always_inline)) int multiply(
    const int is_nf4, const float *states, int64_t num_rows, int64_t inputs, int64_t outputs, const uint8_t *weights,
    const float *weight_scales, const float *bias, float *results, int threads) {
    const int64_t num_blocks = inputs / BLOCK, weights_stride = is_nf4 ? inputs / 2 : inputs;
    int16_t *steps = malloc(num_rows * inputs * sizeof(int16_t));
    float *scales = malloc(num_rows * num_blocks * sizeof(float));
    if (steps == NULL || scales == NULL) return free(steps), free(scales), 1;
    round_states(states, num_rows * num_blocks, steps, scales, is_nf4);
    int8_t bytes[2][16];
    for (int code = 0; code < 16; code++) {
        const int16_t value = (int16_t)__builtin_rintf(MAX_CODE * NF4[code]);
        bytes[0][code] = (int8_t)(value & 255);
        bytes[1][code] = (int8_t)(value >> 8);
    }
    const struct codebook codebook = {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes[0])),
                                      _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes[1]))};
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t begin = 0; begin < outputs; begin += OUTPUTS_IN_CACHE) {
        const int64_t end = begin + OUTPUTS_IN_CACHE < outputs ? begin + OUTPUTS_IN_CACHE : outputs;
        for (int64_t row = 0; row < num_rows; row += ROWS_AT_ONCE)
            for (int64_t output = begin; output < end; output++) {
                const float factor = is_nf4 ? 1.0f / MAX_CODE : weight_scales[output] / 127;
                #define MULTIPLY(n) multiply_rows( \
                    n, is_nf4, num_blocks, weights + output * weights_stride, weight_scales + output * num_blocks, \
                    &codebook, steps + row * inputs, scales + row * num_blocks, factor, bias ? bias[output] : 0, \
                    results + row * outputs + output, outputs)
                switch (num_rows - row) {
                    case 1: MULTIPLY(1); break;
                    case 2: MULTIPLY(2); break;
                    case 3: MULTIPLY(3); break;
                    default: MULTIPLY(ROWS_AT_ONCE);
                }
            }
    }
    return free(steps), free(scales), 0;
}

int nf4_multiply(const float *states, int64_t num_rows, int64_t inputs, int64_t outputs, const uint8_t *weights,
                 const float *scales, const float *bias, float *results, int threads) {
    return multiply(1, states, num_rows, inputs, outputs, weights, scales, bias, results, threads);
}

int int8_multiply(const float *states, int64_t num_rows, int64_t inputs, int64_t outputs, const uint8_t *weights,
                  const float *scales, const float *bias, float *results, int threads) {
    return multiply(0, states, num_rows, inputs, outputs, weights, scales, bias, results, threads);
}
