/* A few rows of states times a matrix stored by columns, all float32.
 *
 * Each column of the layer's weight is a row of `columns: [inputs, outputs]`, as `packed_weights.py` lays them out. The
 * matrix is read once, in pieces of `DEPTH` inputs and `TILE` outputs, each used for all rows while it is in the second
 * cache; a large library's routine first copies it into another order, which for a few rows costs more than the
 * multiplication. Knows nothing of Python or torch; `column_kernel.py` calls it, and checks all sizes.
 *
 * A piece is multiplied by four rows at a time, two vectors wide: their eight sums stay in registers, and each of the six
 * loads an input takes is used more than once. Meanwhile the next piece is asked of memory, a share with each group of
 * rows. For one row there is nothing to wait for but memory, which is read fastest by eight inputs and without asking.
 */
#include <stdint.h>

enum { LANES = 8, LINE = 16, GROUP = 4, VECTORS = 2, DEPTH = 16, TILE = 1024 };
enum { ONE_ROWS_VECTORS = 8, ONE_ROWS_DEPTH = 8, MOST_VECTORS = 8 };

#define INLINE static inline __attribute__((always_inline)) /* into calls whose first arguments are constants */
typedef float floats __attribute__((vector_size(32), aligned(4)));

/* Rows of states and of results follow one another; those of columns are `stride` apart. */
struct sizes {
    int64_t inputs, outputs, stride;
};

/* y[row][...] += the sum over `depth` inputs of x[row][input] * c[input][...], for so many rows, so many vectors wide */
INLINE void add_strip(int rows, int vectors, int depth, const float *x, const float *c, float *y, struct sizes size) {
    floats sums[GROUP][MOST_VECTORS];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) sums[row][v] = (floats){0};
    for (int input = 0; input < depth; input++)
        for (int row = 0; row < rows; row++)
            for (int v = 0; v < vectors; v++)
                sums[row][v] += x[row * size.inputs + input] * *(const floats *)(c + input * size.stride + v * LANES);
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) *(floats *)(y + row * size.outputs + v * LANES) += sums[row][v];
}

/* The same for `count` outputs. As it goes along, asks for those of the inputs [start, end) of the piece at `next`. */
INLINE void add_piece(int rows, int vectors, int depth, const float *x, const float *c, float *y, struct sizes size,
                      int64_t count, const float *next, int64_t start, int64_t end) {
    int64_t i = 0;
    for (; i + vectors * LANES <= count; i += vectors * LANES) {
        for (int64_t input = start; input < end; input++) __builtin_prefetch(next + input * size.stride + i);
        add_strip(rows, vectors, depth, x, c + i, y + i, size);
    }
    for (; i < count; i++)
        for (int row = 0; row < rows; row++) {
            float sum = 0;
            for (int input = 0; input < depth; input++)
                sum += x[row * size.inputs + input] * c[input * size.stride + i];
            y[row * size.outputs + i] += sum;
        }
}

static void multiply_one(const float *x, const float *c, float *y, struct sizes size, int64_t count) {
    int64_t left = size.inputs;
    for (; left >= ONE_ROWS_DEPTH; left -= ONE_ROWS_DEPTH, x += ONE_ROWS_DEPTH, c += ONE_ROWS_DEPTH * size.stride)
        add_piece(1, ONE_ROWS_VECTORS, ONE_ROWS_DEPTH, x, c, y, size, count, 0, 0, 0);
    add_piece(1, ONE_ROWS_VECTORS, (int)left, x, c, y, size, count, 0, 0, 0);
}

/* A piece for all rows; meanwhile asks for `asked` inputs of the next one. */
INLINE void add_all_rows(int depth, const float *x, int64_t rows, const float *c, float *y, struct sizes size,
                         int64_t count, const float *next, int64_t asked) {
    for (int64_t row = 0, start = 0, end; row < rows; row += GROUP, start = end) {
        end = row + GROUP < rows ? asked * (row + GROUP) / rows : asked;
        switch (rows - row) {
        case 1: add_piece(1, VECTORS, depth, x, c, y, size, count, next, start, end); break;
        case 2: add_piece(2, VECTORS, depth, x, c, y, size, count, next, start, end); break;
        case 3: add_piece(3, VECTORS, depth, x, c, y, size, count, next, start, end); break;
        default: add_piece(GROUP, VECTORS, depth, x, c, y, size, count, next, start, end);
        }
        x += GROUP * size.inputs;
        y += GROUP * size.outputs;
    }
}

static void multiply_several(const float *x, int64_t rows, const float *columns, float *y, struct sizes size,
                             int64_t count) {
    for (int64_t first = 0; first < count; first += TILE) {
        const int64_t width = count - first < TILE ? count - first : TILE;
        const int64_t asked_of_next_tile = first + TILE < count && DEPTH <= size.inputs ? DEPTH : 0;
        for (int64_t input = 0; input < size.inputs; input += DEPTH) {
            const float *c = columns + input * size.stride + first;
            const int64_t left = size.inputs - input - DEPTH;
            const float *next = left > 0 ? c + DEPTH * size.stride : columns + first + TILE;
            const int64_t asked = left <= 0 ? asked_of_next_tile : left < DEPTH ? left : DEPTH;
            if (left >= 0)
                add_all_rows(DEPTH, x + input, rows, c, y + first, size, width, next, asked);
            else
                add_all_rows((int)(left + DEPTH), x + input, rows, c, y + first, size, width, next, asked);
        }
    }
}

/* results[row][output] = the sum over all inputs of states[row][input] * columns[input][output] */
void multiply_columns(const float *states, int64_t rows, int64_t inputs, int64_t outputs, const float *columns,
                      int64_t stride, float *results, int threads) {
    const struct sizes size = {inputs, outputs, stride};
    const int64_t lines = (outputs + LINE - 1) / LINE, share = (lines + threads - 1) / threads * LINE;
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t first = 0; first < outputs; first += share) {
        const int64_t count = outputs - first < share ? outputs - first : share;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < count; i++) results[row * outputs + first + i] = 0;
        if (rows == 1)
            multiply_one(states, columns + first, results + first, size, count);
        else
            multiply_several(states, rows, columns + first, results + first, size, count);
    }
}
