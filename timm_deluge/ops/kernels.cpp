// The sums over layers and over positions for a CPU: every layer is read once, and all sums run in registers.
//
// A layer is a matrix. In channels_last memory its rows are positions and its columns are channels (BY_COLUMN); in
// contiguous memory its rows are the channels of one image after the other and its columns are positions.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;  // floats in a vector
#else
constexpr int WIDTH = 8;
#endif
constexpr int UNROLL = 4;        // vectors that share a weight
constexpr int64_t ROWS = 64;     // whose products a float may sum
constexpr int64_t COLUMNS = 2048;

using Floats = float __attribute__((vector_size(4 * WIDTH)));
using Words = uint32_t __attribute__((vector_size(4 * WIDTH)));
using HalfWords = uint16_t __attribute__((vector_size(2 * WIDTH)));

struct bfloat16 {
    uint16_t bits;
};

Floats widen(Floats values) { return values; }
Floats widen(HalfWords bits) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }

void narrow(Floats values, Floats& to) { to = values; }
void narrow(Floats values, HalfWords& to) {  // rounds to the nearest, ties to even
    const Words wide = (Words)values, rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
    to = __builtin_convertvector(values == values ? rounded : Words{} + 0x7fc0, HalfWords);
}

template <class T>
using Vector = std::conditional_t<std::is_same_v<T, float>, Floats, HalfWords>;

// WHOLE vectors have WIDTH elements, others the first `count`.
template <bool WHOLE, class T>
Floats load(const T* from, int count) {
    Vector<T> values{};
    std::memcpy(&values, from, WHOLE ? sizeof values : count * sizeof(T));
    return widen(values);
}

template <bool WHOLE, class T>
void store(Floats values, T* to, int count) {
    Vector<T> narrowed;
    narrow(values, narrowed);
    std::memcpy(to, &narrowed, WHOLE ? sizeof narrowed : count * sizeof(T));
}

struct Shape {
    int64_t rows, columns, channels;
};

struct Tile {
    int64_t row, end_row, column, end_column;
};

// M vectors of one matrix, and the channel that they are, or begin with, in each matrix.
template <bool BY_COLUMN, int M, bool WHOLE>
struct Vectors {
    static constexpr int size = M;
    int64_t offset, step, channel;
    int count;

    template <class T>
    Floats load(const T* layer, int m) const {
        return ::load<WHOLE>(layer + offset + m * step, count);
    }
    template <class T>
    void store(Floats values, T* layer, int m) const {
        ::store<WHOLE>(values, layer + offset + m * step, count);
    }
    Floats parameter(const float* of_channels) const {
        const Floats of_one_channel = Floats{} + of_channels[channel];
        return ::load<WHOLE>(
            BY_COLUMN ? of_channels + channel : reinterpret_cast<const float*>(&of_one_channel), count);
    }
};

template <bool BY_COLUMN, class Work>
void for_each_tile(const Shape& shape, int threads, const Work& work) {
    const int64_t height = BY_COLUMN ? ROWS : 1, width = BY_COLUMN ? shape.columns : std::min(shape.columns, COLUMNS);
    const int64_t across = (shape.columns + width - 1) / width, tiles = across * ((shape.rows + height - 1) / height);
#pragma omp parallel for num_threads(threads)
    for (int thread = 0; thread < threads; thread++)
        for (int64_t i = tiles * thread / threads; i < tiles * (thread + 1) / threads; i++) {
            const int64_t row = i / across * height, column = i % across * width;
            work(Tile{row, std::min(row + height, shape.rows), column, std::min(column + width, shape.columns)}, thread);
        }
}

template <bool BY_COLUMN, int M, class Work>
void for_each_vectors_of_rows(const Shape& shape, const Tile& tile, int64_t row, const Work& work) {
    constexpr int64_t across = BY_COLUMN ? WIDTH : M * WIDTH;
    const int64_t step = BY_COLUMN ? shape.columns : WIDTH, first = row * shape.columns;
    const int64_t channel = BY_COLUMN ? 0 : row % shape.channels;
    int64_t c = tile.column;
    for (; c + across <= tile.end_column; c += across)
        work(Vectors<BY_COLUMN, M, true>{first + c, step, BY_COLUMN ? c : channel, WIDTH});
    if constexpr (!BY_COLUMN)
        for (; c + WIDTH <= tile.end_column; c += WIDTH)
            work(Vectors<BY_COLUMN, 1, true>{first + c, step, channel, WIDTH});
    if (c < tile.end_column)
        work(Vectors<BY_COLUMN, BY_COLUMN ? M : 1, false>{
            first + c, step, BY_COLUMN ? c : channel, int(tile.end_column - c)});
}

template <bool BY_COLUMN, class Work>
void for_each_vectors(const Shape& shape, const Tile& tile, const Work& work) {
    int64_t r = tile.row;
    if constexpr (BY_COLUMN)
        for (; r + UNROLL <= tile.end_row; r += UNROLL) for_each_vectors_of_rows<true, UNROLL>(shape, tile, r, work);
    for (; r < tile.end_row; r++)
        for_each_vectors_of_rows<BY_COLUMN, BY_COLUMN ? 1 : UNROLL>(shape, tile, r, work);
}

template <bool BY_COLUMN, int R, class T>
void combine_results(const T* const* layers, int64_t num_layers, const float* const* weights,
                     const float* const* biases, T* const* outs, bool relu, const Shape& shape, int threads) {
    const Floats floor = Floats{} + (relu ? 0 : -std::numeric_limits<float>::infinity());
    for_each_tile<BY_COLUMN>(shape, threads, [=](const Tile& tile, int) {
        for_each_vectors<BY_COLUMN>(shape, tile, [=](auto vectors) {
            Floats sums[R][vectors.size];
            for (int j = 0; j < R; j++) {
                const Floats bias = vectors.parameter(biases[j]);
                for (int m = 0; m < vectors.size; m++) sums[j][m] = bias;
            }
            for (int64_t i = 0; i < num_layers; i++) {
                Floats values[vectors.size];
                for (int m = 0; m < vectors.size; m++) values[m] = vectors.load(layers[i], m);
                for (int j = 0; j < R; j++) {
                    const Floats weight = vectors.parameter(weights[j] + i * shape.channels);
                    for (int m = 0; m < vectors.size; m++) sums[j][m] += weight * values[m];
                }
            }
            for (int m = 0; m < vectors.size; m++) {
                vectors.store(sums[0][m] < floor ? floor : sums[0][m], outs[0], m);
                for (int j = 1; j < R; j++) vectors.store(sums[j][m], outs[j], m);
            }
        });
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

// Adds a tile's sums, one for each channel or the lanes of one channel's, to their totals, and clears them.
template <bool BY_COLUMN>
void move_sums(float* sums, double* totals, const Shape& shape, const Tile& tile) {
    double* total = totals + (BY_COLUMN ? 0 : tile.row % shape.channels);
    for (int64_t k = 0; k < (BY_COLUMN ? shape.channels : WIDTH); k++) {
        total[BY_COLUMN ? k : 0] += sums[k];
        sums[k] = 0;
    }
}

// dots: zeros, [threads, num_grads, channels]
template <bool BY_COLUMN, class T>
void combine_backward(const T* const* grads, int64_t num_grads, const float* weight, const T* layer, const float* mean,
                      T* out, double* dots, const Shape& shape, int threads) {
    const int64_t num_sums = BY_COLUMN ? (shape.channels + WIDTH - 1) / WIDTH * WIDTH : WIDTH;
    std::vector<float> all_sums(threads * num_grads * num_sums);
    float* const first_sums = all_sums.data();
    for_each_tile<BY_COLUMN>(shape, threads, [=](const Tile& tile, int thread) {
        float* const sums = first_sums + thread * num_grads * num_sums;
        for_each_vectors<BY_COLUMN>(shape, tile, [=](auto vectors) {
            Floats values[vectors.size], results[vectors.size];
            for (int m = 0; m < vectors.size; m++) {
                values[m] = vectors.load(layer, m) - vectors.parameter(mean);
                results[m] = Floats{};
            }
            for (int64_t i = 0; i < num_grads; i++) {
                float* const sum = sums + i * num_sums + (BY_COLUMN ? vectors.channel : 0);
                const Floats scale = vectors.parameter(weight + i * shape.channels);
                Floats dot = load<true>(sum, WIDTH);
                for (int m = 0; m < vectors.size; m++) {
                    const Floats grad = vectors.load(grads[i], m);
                    results[m] += scale * grad;
                    dot += grad * values[m];
                }
                store<true>(dot, sum, WIDTH);
            }
            for (int m = 0; m < vectors.size; m++) vectors.store(results[m], out, m);
        });
        for (int64_t i = 0; i < num_grads; i++)
            move_sums<BY_COLUMN>(
                sums + i * num_sums, dots + (thread * num_grads + i) * shape.channels, shape, tile);
    });
}

struct Pair {
    Floats first, second;
};

// Sums two terms of every element, terms(vectors, m), over its channel: [2, channels].
template <bool BY_COLUMN, class Terms>
std::vector<double> channel_sums(const Shape& shape, int threads, const Terms& terms) {
    const int64_t num_sums = BY_COLUMN ? (shape.channels + WIDTH - 1) / WIDTH * WIDTH : WIDTH;
    std::vector<double> totals(threads * 2 * shape.channels);
    std::vector<float> all_sums(threads * 2 * num_sums);
    for_each_tile<BY_COLUMN>(shape, threads, [=, &totals, &all_sums](const Tile& tile, int thread) {
        float *const first = &all_sums[thread * 2 * num_sums], *const second = first + num_sums;
        for_each_vectors<BY_COLUMN>(shape, tile, [=](auto vectors) {
            const int64_t k = BY_COLUMN ? vectors.channel : 0;
            Floats first_sum = load<true>(first + k, WIDTH), second_sum = load<true>(second + k, WIDTH);
            for (int m = 0; m < vectors.size; m++) {
                const Pair pair = terms(vectors, m);
                first_sum += pair.first;
                second_sum += pair.second;
            }
            store<true>(first_sum, first + k, WIDTH);
            store<true>(second_sum, second + k, WIDTH);
        });
        double* const total = &totals[thread * 2 * shape.channels];
        move_sums<BY_COLUMN>(first, total, shape, tile);
        move_sums<BY_COLUMN>(second, total + shape.channels, shape, tile);
    });
    for (int64_t i = 2 * shape.channels; i < int64_t(totals.size()); i++) totals[i % (2 * shape.channels)] += totals[i];
    return totals;
}

template <bool BY_COLUMN, class T>
void moments(const T* x, float* mean, float* var, const Shape& shape, int threads) {
    // of distances from one element, since the squares of a large mean would swallow a small variance
    std::vector<float> origin(shape.channels);
    for (int64_t k = 0; k < shape.channels; k++)
        origin[k] = load<false>(x + (BY_COLUMN ? k : k * shape.columns), 1)[0];
    const float* from = origin.data();
    const auto sums = channel_sums<BY_COLUMN>(shape, threads, [=](auto vectors, int m) {
        const Floats distance = vectors.load(x, m) - vectors.parameter(from);
        return Pair{distance, distance * distance};
    });
    const double count = double(shape.rows) * shape.columns / shape.channels;
    for (int64_t k = 0; k < shape.channels; k++) {
        const double distance = sums[k] / count, square = sums[shape.channels + k] / count;
        mean[k] = origin[k] + distance;
        var[k] = std::max(square - distance * distance, 0.);
    }
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
    const auto relu_grad = [=](auto vectors, int m, Floats values) {
        const Floats result = vectors.parameter(shift) + vectors.parameter(scale) * values;
        return result <= 0.f ? Floats{} : vectors.load(grads, m);
    };
    const auto sums = channel_sums<BY_COLUMN>(shape, threads, [=](auto vectors, int m) {
        const Floats values = vectors.load(x, m), grad = relu_grad(vectors, m, values);
        return Pair{grad, grad * (values - vectors.parameter(mean))};
    });
    const double count = double(shape.rows) * shape.columns / shape.channels;
    for (int64_t k = 0; k < shape.channels; k++) {
        bias_grad[k] = sums[k];
        weight_grad[k] = sums[shape.channels + k] * invstd[k];
        if (!training) continue;
        x_scale[k] = -scale[k] * invstd[k] * weight_grad[k] / count;
        offset[k] = -scale[k] * bias_grad[k] / count - x_scale[k] * mean[k];
    }
    for_each_tile<BY_COLUMN>(shape, threads, [=](const Tile& tile, int) {
        for_each_vectors<BY_COLUMN>(shape, tile, [=](auto vectors) {
            for (int m = 0; m < vectors.size; m++) {
                const Floats values = vectors.load(x, m), grad = relu_grad(vectors, m, values);
                const Floats centred = vectors.parameter(x_scale) * values + vectors.parameter(offset);
                vectors.store(vectors.parameter(scale) * grad + centred, out, m);
            }
        });
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
