/* A few rows of states times a matrix stored by columns, all float32.
 *
 * Each column of the layer's weight is a contiguous row of `columns: [inputs, outputs]`, as `packed_weights.py` lays them
 * out. The matrix is read once, from one end to the other in pieces of some kilobytes, each used for all rows while it
 * is in the first cache; a large library's routine first copies it into another order, which for a few rows costs more
 * than the multiplication. Knows nothing of Python or torch; `column_kernel.py` calls it, and checks all sizes.
 */
#include <stdint.h>

enum { TILE = 1024, DEPTH = 8 };

/* y += x[0..7] * c[0..7][...] */
static inline void add_to_one(const float *x, const float *restrict c, int64_t stride, float *restrict y, int64_t count) {
    const float x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3], x4 = x[4], x5 = x[5], x6 = x[6], x7 = x[7];
    for (int64_t i = 0; i < count; i++)
        y[i] += ((x0 * c[i] + x1 * c[stride + i]) + (x2 * c[2 * stride + i] + x3 * c[3 * stride + i])) +
                ((x4 * c[4 * stride + i] + x5 * c[5 * stride + i]) + (x6 * c[6 * stride + i] + x7 * c[7 * stride + i]));
}

/* The same for two rows, which share what is loaded; by four, as more would not fit the sixteen registers. */
static inline void add_to_two(const float *x, const float *z, const float *restrict c, int64_t stride,
                              float *restrict y, float *restrict v, int64_t count) {
    const float x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3], z0 = z[0], z1 = z[1], z2 = z[2], z3 = z[3];
    for (int64_t i = 0; i < count; i++) {
        const float c0 = c[i], c1 = c[stride + i], c2 = c[2 * stride + i], c3 = c[3 * stride + i];
        y[i] += (x0 * c0 + x1 * c1) + (x2 * c2 + x3 * c3);
        v[i] += (z0 * c0 + z1 * c1) + (z2 * c2 + z3 * c3);
    }
}

/* results[row][output] = the sum over all inputs of states[row][input] * columns[input][output] */
void multiply_columns(const float *states, int64_t rows, int64_t inputs, int64_t outputs, const float *columns,
                      float *results, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t first = 0; first < outputs; first += TILE) {
        const int64_t count = outputs - first < TILE ? outputs - first : TILE;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < count; i++) results[row * outputs + first + i] = 0;
        for (int64_t input = 0; input < inputs; input += DEPTH) {
            const float *c = columns + input * outputs + first, *x = states + input;
            float *y = results + first;
            int64_t row = 0;
            for (; row + 2 <= rows; row += 2, x += 2 * inputs, y += 2 * outputs)
                for (int half = 0; half < DEPTH; half += DEPTH / 2)
                    add_to_two(x + half, x + inputs + half, c + half * outputs, outputs, y, y + outputs, count);
            if (row < rows) add_to_one(x, c, outputs, y, count);
        }
    }
}
