// The two sums over layers for a CPU: every layer is read once, in tiles that stay in a core's first cache.
//
// A layer is a matrix. In channels_last memory its rows are positions and its columns are channels (BY_COLUMN); in
// contiguous memory its rows are the channels of one image after the other and its columns are positions.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t TILE = 4096;  // elements

struct bfloat16 {
    uint16_t bits;

    bfloat16(float value) {  // rounds to the nearest, ties to even
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        bits = value == value ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fc0;
    }
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

struct Shape {
    int64_t rows, columns, channels;
};

struct Tile {
    int64_t row, end_row, column, columns;
};

template <class Work>
void for_each_tile(const Shape& shape, int threads, const Work& work) {
    const int64_t width = std::min(shape.columns, TILE), across = (shape.columns + width - 1) / width;
    const int64_t height = TILE / width, tiles = across * ((shape.rows + height - 1) / height);
#pragma omp parallel for num_threads(threads)
    for (int thread = 0; thread < threads; thread++)
        for (int64_t i = tiles * thread / threads; i < tiles * (thread + 1) / threads; i++) {
            const int64_t row = i / across * height, column = i % across * width;
            work(Tile{row, std::min(row + height, shape.rows), column, std::min(width, shape.columns - column)}, thread);
        }
}

// Adds N layers to a tile's sums.
template <bool BY_COLUMN, int N, class T>
void add_layers(const T* const* layers, const float* weight, float* sums, const Shape& shape, const Tile& tile) {
    for (int64_t r = tile.row; r < tile.end_row; r++, sums += tile.columns) {
        const float* w = weight + (BY_COLUMN ? tile.column : r % shape.channels);
        const int64_t offset = r * shape.columns + tile.column;
#pragma omp simd
        for (int64_t c = 0; c < tile.columns; c++) {
            float sum = sums[c];
            for (int i = 0; i < N; i++) sum += w[i * shape.channels + (BY_COLUMN ? c : 0)] * layers[i][offset + c];
            sums[c] = sum;
        }
    }
}

template <bool BY_COLUMN, class T>
void combine(const T* const* layers, int64_t num_layers, const float* weight, const float* bias, T* out,
             const Shape& shape, int threads) {
    for_each_tile(shape, threads, [=](const Tile& tile, int) {
        float sums[TILE];
        float* sum = sums;
        for (int64_t r = tile.row; r < tile.end_row; r++, sum += tile.columns)
            for (int64_t c = 0; c < tile.columns; c++) sum[c] = bias[BY_COLUMN ? tile.column + c : r % shape.channels];
        int64_t i = 0;
        for (; i + 4 <= num_layers; i += 4)
            add_layers<BY_COLUMN, 4>(layers + i, weight + i * shape.channels, sums, shape, tile);
        for (; i < num_layers; i++)
            add_layers<BY_COLUMN, 1>(layers + i, weight + i * shape.channels, sums, shape, tile);
        sum = sums;
        for (int64_t r = tile.row; r < tile.end_row; r++, sum += tile.columns)
            std::copy_n(sum, tile.columns, out + r * shape.columns + tile.column);
    });
}

// Adds what N rows of a tile give, with channels as columns, to each column's sum.
template <int N, class T>
void add_rows(const T* layer, const T* grad, const float* mean, float* sums, int64_t columns, int64_t stride) {
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) {
        float sum = sums[c];
        for (int r = 0; r < N; r++) sum += grad[r * stride + c] * (layer[r * stride + c] - mean[c]);
        sums[c] = sum;
    }
}

template <class T>
void correlate_columns(const T* layer, const T* grad, const float* mean, double* out, const Shape& s, const Tile& t) {
    float sums[TILE] = {};
    int64_t r = t.row, offset = r * s.columns + t.column;
    for (; r + 4 <= t.end_row; r += 4, offset += 4 * s.columns)
        add_rows<4>(layer + offset, grad + offset, mean + t.column, sums, t.columns, s.columns);
    for (; r < t.end_row; r++, offset += s.columns)
        add_rows<1>(layer + offset, grad + offset, mean + t.column, sums, t.columns, s.columns);
    for (int64_t c = 0; c < t.columns; c++) out[t.column + c] += sums[c];
}

template <class T>
void correlate_rows(const T* layer, const T* grad, const float* means, double* out, const Shape& s, const Tile& t) {
    for (int64_t r = t.row; r < t.end_row; r++) {
        const int64_t offset = r * s.columns + t.column;
        const float mean = means[r % s.channels];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < t.columns; c++) sum += grad[offset + c] * (layer[offset + c] - mean);
        out[r % s.channels] += sum;
    }
}

// out: zeros, [threads, num_layers, channels]
template <bool BY_COLUMN, class T>
void correlate(const T* const* layers, int64_t num_layers, const float* means, const T* grad, double* out,
               const Shape& shape, int threads) {
    for_each_tile(shape, threads, [=](const Tile& tile, int thread) {
        for (int64_t i = 0; i < num_layers; i++)
            (BY_COLUMN ? correlate_columns<T> : correlate_rows<T>)(
                layers[i], grad, means + i * shape.channels, out + (thread * num_layers + i) * shape.channels,
                shape, tile);
    });
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                                        \
    void combine_##DTYPE(const T* const* layers, int64_t num_layers, const float* weight, const float* bias,    \
                         T* out, const Shape* shape, int by_column, int threads) {                              \
        (by_column ? combine<true, T> : combine<false, T>)(                                                     \
            layers, num_layers, weight, bias, out, *shape, threads);                                            \
    }                                                                                                           \
    void correlate_##DTYPE(const T* const* layers, int64_t num_layers, const float* means, const T* grad,       \
                           double* out, const Shape* shape, int by_column, int threads) {                       \
        (by_column ? correlate<true, T> : correlate<false, T>)(                                                 \
            layers, num_layers, means, grad, out, *shape, threads);                                             \
    }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
}
