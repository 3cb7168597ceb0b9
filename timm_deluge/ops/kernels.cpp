// The sums over layers and over positions for a CPU: a layer is read once, in tiles that stay in a core's first cache.
//
// A layer is a matrix. In channels_last memory its rows are positions and its columns are channels (BY_COLUMN); in
// contiguous memory its rows are the channels of one image after the other and its columns are positions.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t TILE = 2048;  // elements

// GCC vectorises a store through an assignment, but not one through a constructor.
struct bfloat16 {
    uint16_t bits;

    bfloat16& operator=(float value) {
        bits = round(value);
        return *this;
    }
    operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

private:
    static uint16_t round(float value) {  // to the nearest, ties to even
        const uint32_t wide = __builtin_bit_cast(uint32_t, value);
        return value == value ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fc0;
    }
};

struct Shape {
    int64_t rows, columns, channels;
};

struct Tile {
    int64_t row, end_row, column, columns;
};

struct Pair {
    float first, second;
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

// Adds N layers to the biases (FIRST) or to a tile's sums, of R results; these go out (LAST) or into the sums.
template <bool BY_COLUMN, int N, int R, bool FIRST, bool LAST, class T>
void add_layers(const T* const* layers, int64_t first_layer, const float* const* weights, const float* const* biases,
                float* sums, T* const* outs, float floor, const Shape& shape, const Tile& tile) {
    for (int64_t r = tile.row; r < tile.end_row; r++, sums += tile.columns) {
        const int64_t channel = BY_COLUMN ? tile.column : r % shape.channels;
        const int64_t offset = r * shape.columns + tile.column;
#pragma omp simd
        for (int64_t c = 0; c < tile.columns; c++) {
            const int64_t k = channel + (BY_COLUMN ? c : 0);
            float values[N];
            for (int i = 0; i < N; i++) values[i] = layers[first_layer + i][offset + c];
            for (int j = 0; j < R; j++) {
                float sum = FIRST ? biases[j][k] : sums[j * TILE + c];
                for (int i = 0; i < N; i++) sum += weights[j][(first_layer + i) * shape.channels + k] * values[i];
                if (LAST) outs[j][offset + c] = j == 0 && sum < floor ? floor : sum;
                else sums[j * TILE + c] = sum;
            }
        }
    }
}

template <bool BY_COLUMN, int R, class T>
void combine_results(const T* const* layers, int64_t num_layers, const float* const* weights,
                     const float* const* biases, T* const* outs, bool relu, const Shape& shape, int threads) {
    const float floor = relu ? 0 : -std::numeric_limits<float>::infinity();
    for_each_tile(shape, threads, [=](const Tile& tile, int) {
        float sums[R * TILE];
        const auto add = [&](auto add_layers, int64_t i) {
            add_layers(layers, i, weights, biases, sums, outs, floor, shape, tile);
        };
        if (num_layers == 1) return add(add_layers<BY_COLUMN, 1, R, true, true, T>, 0);
        add(add_layers<BY_COLUMN, 1, R, true, false, T>, 0);
        int64_t i = 1;
        for (; i + 4 < num_layers; i += 4) add(add_layers<BY_COLUMN, 4, R, false, false, T>, i);
        for (; i + 1 < num_layers; i++) add(add_layers<BY_COLUMN, 1, R, false, false, T>, i);
        add(add_layers<BY_COLUMN, 1, R, false, true, T>, i);
    });
}

template <bool BY_COLUMN, class T>
void combine(const T* const* layers, int64_t num_layers, const float* const* weights, const float* const* biases,
             T* const* outs, int64_t num_results, bool relu, const Shape& shape, int threads) {
    int64_t k = 0;
    for (; k + 4 <= num_results; k += 4)
        combine_results<BY_COLUMN, 4>(
            layers, num_layers, weights + k, biases + k, outs + k, relu && k == 0, shape, threads);
    for (; k < num_results; k++)
        combine_results<BY_COLUMN, 1>(
            layers, num_layers, weights + k, biases + k, outs + k, relu && k == 0, shape, threads);
}

// Adds N gradients to a tile's sums, and each one's products with the tile's values to its own dots.
template <bool BY_COLUMN, int N, class T>
void add_grads(const T* const* grads, const float* weight, const float* values, float* sums, double* dots,
               const Shape& shape, const Tile& tile) {
    float column_dots[N * TILE];
    std::fill_n(column_dots, BY_COLUMN ? N * tile.columns : 0, 0.f);
    for (int64_t r = tile.row; r < tile.end_row; r++, sums += tile.columns, values += tile.columns) {
        const int64_t channel = BY_COLUMN ? tile.column : r % shape.channels;
        const int64_t offset = r * shape.columns + tile.column;
        float row_dots[N] = {};
#pragma omp simd reduction(+ : row_dots)
        for (int64_t c = 0; c < tile.columns; c++) {
            float sum = sums[c];
            for (int i = 0; i < N; i++) {
                const float grad = grads[i][offset + c];
                sum += weight[i * shape.channels + channel + (BY_COLUMN ? c : 0)] * grad;
                (BY_COLUMN ? column_dots[i * tile.columns + c] : row_dots[i]) += grad * values[c];
            }
            sums[c] = sum;
        }
        for (int i = 0; !BY_COLUMN && i < N; i++) dots[i * shape.channels + channel] += row_dots[i];
    }
    for (int i = 0; BY_COLUMN && i < N; i++)
        for (int64_t c = 0; c < tile.columns; c++)
            dots[i * shape.channels + tile.column + c] += column_dots[i * tile.columns + c];
}

// dots: zeros, [threads, num_grads, channels]
template <bool BY_COLUMN, class T>
void combine_backward(const T* const* grads, int64_t num_grads, const float* weight, const T* layer, const float* mean,
                      T* out, double* dots, const Shape& shape, int threads) {
    for_each_tile(shape, threads, [=](const Tile& tile, int thread) {
        float sums[TILE] = {}, values[TILE];
        for (int64_t r = tile.row, k = 0; r < tile.end_row; r++)
            for (int64_t c = 0; c < tile.columns; c++, k++)
                values[k] = layer[r * shape.columns + tile.column + c]
                    - mean[BY_COLUMN ? tile.column + c : r % shape.channels];
        double* dot = dots + thread * num_grads * shape.channels;
        int64_t i = 0;
        for (; i + 4 <= num_grads; i += 4)
            add_grads<BY_COLUMN, 4>(
                grads + i, weight + i * shape.channels, values, sums, dot + i * shape.channels, shape, tile);
        for (; i < num_grads; i++)
            add_grads<BY_COLUMN, 1>(
                grads + i, weight + i * shape.channels, values, sums, dot + i * shape.channels, shape, tile);
        for (int64_t r = tile.row, k = 0; r < tile.end_row; r++, k += tile.columns)
            std::copy_n(sums + k, tile.columns, out + r * shape.columns + tile.column);
    });
}

// Sums two terms of every element, terms(position, channel), over its channel: [2, channels].
template <bool BY_COLUMN, class Terms>
std::vector<double> channel_sums(const Shape& shape, int threads, const Terms& terms) {
    std::vector<double> sums(threads * 2 * shape.channels);
    for_each_tile(shape, threads, [=, &sums](const Tile& tile, int thread) {
        double *first = &sums[thread * 2 * shape.channels], *second = first + shape.channels;
        float column_first[TILE], column_second[TILE];
        std::fill_n(column_first, BY_COLUMN ? tile.columns : 0, 0.f);
        std::fill_n(column_second, BY_COLUMN ? tile.columns : 0, 0.f);
        for (int64_t r = tile.row; r < tile.end_row; r++) {
            const int64_t channel = BY_COLUMN ? tile.column : r % shape.channels;
            const int64_t offset = r * shape.columns + tile.column;
            float row_first = 0, row_second = 0;
#pragma omp simd reduction(+ : row_first, row_second)
            for (int64_t c = 0; c < tile.columns; c++) {
                const Pair pair = terms(offset + c, channel + (BY_COLUMN ? c : 0));
                (BY_COLUMN ? column_first[c] : row_first) += pair.first;
                (BY_COLUMN ? column_second[c] : row_second) += pair.second;
            }
            if (BY_COLUMN) continue;
            first[channel] += row_first;
            second[channel] += row_second;
        }
        for (int64_t c = 0; BY_COLUMN && c < tile.columns; c++) {
            first[tile.column + c] += column_first[c];
            second[tile.column + c] += column_second[c];
        }
    });
    for (int64_t i = 2 * shape.channels; i < int64_t(sums.size()); i++) sums[i % (2 * shape.channels)] += sums[i];
    return sums;
}

template <bool BY_COLUMN, class T>
void moments(const T* x, float* mean, float* var, const Shape& shape, int threads) {
    // of distances from one element, since the squares of a large mean would swallow a small variance
    std::vector<float> origin(shape.channels);
    for (int64_t k = 0; k < shape.channels; k++) origin[k] = x[BY_COLUMN ? k : k * shape.columns];
    const float* from = origin.data();
    const auto sums = channel_sums<BY_COLUMN>(shape, threads, [=](int64_t i, int64_t k) {
        const float distance = x[i] - from[k];
        return Pair{distance, distance * distance};
    });
    const double count = double(shape.rows) * shape.columns / shape.channels;
    for (int64_t k = 0; k < shape.channels; k++) {
        const double distance = sums[k] / count, square = sums[shape.channels + k] / count;
        mean[k] = origin[k] + distance;
        var[k] = std::max(square - distance * distance, 0.);
    }
}

template <class T>
float relu_grad(float grad, const T& x, float scale, float shift) {
    return shift + scale * x <= 0 ? 0 : grad;
}

template <bool BY_COLUMN, class T>
void norm_act_backward(const T* grads, const T* x, const float* weight, const float* bias, const float* mean,
                       const float* invstd, bool training, T* out, float* weight_grad, float* bias_grad,
                       const Shape& shape, int threads) {
    std::vector<float> affine(4 * shape.channels);
    float *scale = affine.data(), *shift = scale + shape.channels;
    float *x_scale = shift + shape.channels, *offset = x_scale + shape.channels;
    for (int64_t k = 0; k < shape.channels; k++) {
        scale[k] = weight[k] * invstd[k];
        shift[k] = bias[k] - scale[k] * mean[k];
    }
    const auto sums = channel_sums<BY_COLUMN>(shape, threads, [=](int64_t i, int64_t k) {
        const float grad = relu_grad(grads[i], x[i], scale[k], shift[k]);
        return Pair{grad, grad * (x[i] - mean[k])};
    });
    const double count = double(shape.rows) * shape.columns / shape.channels;
    for (int64_t k = 0; k < shape.channels; k++) {
        bias_grad[k] = sums[k];
        weight_grad[k] = sums[shape.channels + k] * invstd[k];
        if (!training) continue;
        x_scale[k] = -scale[k] * invstd[k] * weight_grad[k] / count;
        offset[k] = -scale[k] * bias_grad[k] / count - x_scale[k] * mean[k];
    }
    for_each_tile(shape, threads, [=](const Tile& tile, int) {
        for (int64_t r = tile.row; r < tile.end_row; r++) {
            const int64_t channel = BY_COLUMN ? tile.column : r % shape.channels;
            const int64_t begin = r * shape.columns + tile.column;
#pragma omp simd
            for (int64_t c = 0; c < tile.columns; c++) {
                const int64_t i = begin + c, k = channel + (BY_COLUMN ? c : 0);
                out[i] = scale[k] * relu_grad(grads[i], x[i], scale[k], shift[k]) + x_scale[k] * x[i] + offset[k];
            }
        }
    });
}

}  // namespace

using Element = ELEMENT;  // float or bfloat16, given by the compiler's caller

extern "C" {

void combine(const Element* const* layers, int64_t num_layers, const float* const* weights, const float* const* biases,
             Element* const* outs, int64_t num_results, int64_t relu, const Shape* shape, int by_column, int threads) {
    (by_column ? combine<true, Element> : combine<false, Element>)(
        layers, num_layers, weights, biases, outs, num_results, relu, *shape, threads);
}

void combine_backward(const Element* const* grads, int64_t num_grads, const float* weight, const Element* layer,
                      const float* mean, Element* out, double* dots, const Shape* shape, int by_column, int threads) {
    (by_column ? combine_backward<true, Element> : combine_backward<false, Element>)(
        grads, num_grads, weight, layer, mean, out, dots, *shape, threads);
}

void moments(const Element* x, float* mean, float* var, const Shape* shape, int by_column, int threads) {
    (by_column ? moments<true, Element> : moments<false, Element>)(x, mean, var, *shape, threads);
}

void norm_act_backward(const Element* grads, const Element* x, const float* weight, const float* bias,
                       const float* mean, const float* invstd, int64_t training, Element* out, float* weight_grad,
                       float* bias_grad, const Shape* shape, int by_column, int threads) {
    (by_column ? norm_act_backward<true, Element> : norm_act_backward<false, Element>)(
        grads, x, weight, bias, mean, invstd, training, out, weight_grad, bias_grad, *shape, threads);
}

}
