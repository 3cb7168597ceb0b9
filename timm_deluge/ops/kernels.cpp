// The sums over layers and over positions for a CPU: each read of a layer serves up to four sums, held in registers.
//
// A layer is a matrix. In channels_last memory its rows are positions and its columns are channels (BY_COLUMN); in
// contiguous memory its rows are the channels of one image after the other and its columns are positions.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;  // floats in a vector
constexpr int UNROLL = 4;  // vectors at once: 32 registers hold as many of each of four results, too
#else
constexpr int WIDTH = 8;
constexpr int UNROLL = 2;  // with 16 registers
#endif
// AHEAD: elements between what is read and what is prefetched meanwhile; SHORT_ROW: elements of a row of which four
// layers' gradients are summed in tiles as wide as the row; COLUMNS_SUMMED: columns whose sums over the rows are kept in
// registers. All were measured on processors with these features.
#if defined(__AMX_TILE__)
constexpr int64_t AHEAD = 2048, SHORT_ROW = 256, COLUMNS_SUMMED = 128;
#elif defined(__AVX512F__)
constexpr int64_t AHEAD = 4096, SHORT_ROW = 128, COLUMNS_SUMMED = 64;
#else
constexpr int64_t AHEAD = 512;  // second-level caches of 512 KB hold what is prefetched of all layers
constexpr int64_t SHORT_ROW = 128, COLUMNS_SUMMED = 64;
#endif
constexpr int LINE = 64;         // bytes of a cache line
constexpr int64_t ROWS = 64;     // rows whose products are summed in a float before they go to a double
template <bool BY_COLUMN>  // vectors side by side that are summed at once; contiguous rows may be short
constexpr int SUMMED = (BY_COLUMN ? COLUMNS_SUMMED : 32) / WIDTH;
constexpr int64_t VECTORS = 64;  // the number of vectors whose sums stay in a core's first-level cache
constexpr int64_t COLUMNS = VECTORS / UNROLL * WIDTH;
constexpr int64_t APART = 64;    // floats between what two threads write, lest they share a cache line

using Floats = float __attribute__((vector_size(4 * WIDTH)));
using Words = uint32_t __attribute__((vector_size(4 * WIDTH)));
using HalfWords = uint16_t __attribute__((vector_size(2 * WIDTH)));

template <int value>
using Int = std::integral_constant<int, value>;

struct bfloat16 {
    uint16_t bits;
};

Floats widen(Floats values) { return values; }
Floats widen(HalfWords bits) {
#ifdef __AVX512F__
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
#endif
}

void narrow(Floats values, Floats& to) { to = values; }
void narrow(Floats values, HalfWords& to) {  // rounds to the nearest, ties to even
#ifdef __AVX512BF16__
    to = (HalfWords)_mm512_cvtneps_pbh((__m512)values);
#else
    const Words wide = (Words)values, rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
    const Words halves = values == values ? rounded : Words{} + 0x7fc0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i both = (__m256i)halves;
    to = (HalfWords)_mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
#else
    to = __builtin_convertvector(halves, HalfWords);
#endif
#endif
}

// Without this, GCC would load a vector again for each of its products.
void keep_in_register(Floats& values) {
#ifdef __AVX2__
    asm("" : "+v"(values));
#endif
}

template <class T>
using Vector = std::conditional_t<std::is_same_v<T, float>, Floats, HalfWords>;

// Load and store fewer than WIDTH elements. With their number unknown to the compiler, memcpy would be a call, which
// takes as long as several vectors.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
Floats load_first(const float* from, int count) { return (Floats)_mm512_maskz_loadu_ps((1u << count) - 1, from); }
HalfWords load_first(const bfloat16* from, int count) {
    return (HalfWords)_mm256_maskz_loadu_epi16((1u << count) - 1, from);
}
void store_first(Floats values, float* to, int count) { _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)values); }
void store_first(HalfWords values, bfloat16* to, int count) {
    _mm256_mask_storeu_epi16(to, (1u << count) - 1, (__m256i)values);
}
#else
template <int N = WIDTH / 2, class T>
void copy_first(T* to, const T* from, int count) {  // fewer than 2 * N
    if (count & N) {
        std::memcpy(to, from, N * sizeof(T));
        to += N, from += N;
    }
    if constexpr (N > 1) copy_first<N / 2>(to, from, count);
}

template <class T>
Vector<T> load_first(const T* from, int count) {
    Vector<T> values{};
    copy_first(reinterpret_cast<T*>(&values), from, count);
    return values;
}

template <class T>
void store_first(Vector<T> values, T* to, int count) {
    copy_first(to, reinterpret_cast<const T*>(&values), count);
}
#endif

// WHOLE vectors have WIDTH elements, others the first `count`.
template <bool WHOLE, class T>
Floats load(const T* from, int count) {
    Vector<T> values;
    if constexpr (WHOLE) std::memcpy(&values, from, sizeof values);
    else values = load_first(from, count);
    return widen(values);
}

template <bool WHOLE, class T>
void store(Floats values, T* to, int count) {
    Vector<T> narrowed;
    narrow(values, narrowed);
    if constexpr (WHOLE) std::memcpy(to, &narrowed, sizeof narrowed);
    else store_first(narrowed, to, count);
}

struct Shape {
    int64_t rows, columns, channels;
};

struct Tile {
    int64_t row, end_row, column, end_column;
};

// M vectors of one matrix, a step apart, and the channel that all of them are of or, BY_COLUMN, begin with. If they lie
// side by side (ACROSS), it is the first one's, and the others have the channels that follow.
template <bool BY_COLUMN, int M, bool WHOLE, bool ACROSS = false>
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
    // Prefetches what lies ahead into the second-level cache. The processor's own prefetching follows only few streams,
    // and the first-level cache would evict it, as all layers may map to the same sets.
    template <class T>
    void prefetch(const T* layer, int m) const {
        __builtin_prefetch(layer + offset + m * step + AHEAD, 0, 2);
    }
    Floats parameter(const float* of_channels, int m = 0) const { return own_parameter(of_channels + channel, m); }
    Floats own_parameter(const float* of_channel, int m = 0) const {
        const Floats of_one_channel = Floats{} + *of_channel;
        return ::load<WHOLE>(BY_COLUMN ? of_channel + (ACROSS ? m * WIDTH : 0)
                                       : reinterpret_cast<const float*>(&of_one_channel), count);
    }
};

// The weights of R sums, copied in the order in which they are read. As given, [layers, channels] for each sum, those
// of a few channels are too far apart for the first-level cache to keep them.
template <bool BY_COLUMN, int R>
struct Weights {
    static constexpr int64_t BLOCK = BY_COLUMN ? LINE / sizeof(float) : 1;  // channels side by side, a cache line
    static constexpr int64_t OF_LAYER = R * BLOCK;
    int64_t of_block;
    std::vector<float> values;  // [blocks of channels, layers, R, BLOCK], and a BLOCK to point to if there is no layer

    Weights(const float* const* weights, int64_t num_layers, int64_t channels)
        : of_block(num_layers * OF_LAYER), values((channels + BLOCK - 1) / BLOCK * of_block + BLOCK) {
        float* to = values.data();
        for (int64_t c = 0; c < channels; c += BLOCK)
            for (int64_t i = 0; i < num_layers; i++)
                for (int j = 0; j < R; j++, to += BLOCK)
                    std::copy_n(weights[j] + i * channels + c, std::min(BLOCK, channels - c), to);
    }
    const float* of_channel(int64_t channel) const { return &values[channel / BLOCK * of_block + channel % BLOCK]; }
};

template <bool BY_COLUMN, class Work>
void for_each_tile(const Shape& shape, int threads, const Work& work, int64_t max_columns = COLUMNS) {
    const int64_t height = BY_COLUMN ? ROWS : 1;
    const int64_t width = std::min(shape.columns, BY_COLUMN ? max_columns : VECTORS * WIDTH);
    const int64_t across = (shape.columns + width - 1) / width, tiles = across * ((shape.rows + height - 1) / height);
#pragma omp parallel for num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        const int64_t first = tiles * thread / threads, end = tiles * (thread + 1) / threads;
        int64_t row = first / across * height, column = first % across * width;
        for (int64_t i = first; i < end; i++) {
            const int64_t end_column = std::min(column + width, shape.columns);
            work(Tile{row, std::min(row + height, shape.rows), column, end_column}, thread);
            column = end_column == shape.columns ? 0 : end_column;
            row += column ? 0 : height;
        }
    }
}

// Splits a tile into parts of at most VECTORS vectors, or of UNROLL rows.
template <class Work>
void for_each_part(const Tile& tile, const Work& work) {
    const int64_t across = (tile.end_column - tile.column + WIDTH - 1) / WIDTH;
    const int64_t height = std::max<int64_t>(VECTORS / across, UNROLL);
    for (int64_t row = tile.row; row < tile.end_row; row += height)
        work(Tile{row, std::min(row + height, tile.end_row), tile.column, tile.end_column});
}

// M vectors at once: side by side or, DOWN, one below another.
template <bool BY_COLUMN, int M, bool DOWN, class Work>
void for_each_vectors_of_rows(const Shape& shape, const Tile& tile, int64_t row, Work& work) {
    constexpr int64_t across = DOWN ? WIDTH : M * WIDTH;
    const int64_t step = DOWN ? shape.columns : WIDTH, first = row * shape.columns;
    const int64_t channel = BY_COLUMN ? 0 : row % shape.channels;
    int64_t c = tile.column;
    for (; c + across <= tile.end_column; c += across)
        work(Vectors<BY_COLUMN, M, true, BY_COLUMN && !DOWN>{first + c, step, BY_COLUMN ? c : channel, WIDTH});
    if constexpr (!DOWN)
        for (; c + WIDTH <= tile.end_column; c += WIDTH)
            work(Vectors<BY_COLUMN, 1, true>{first + c, step, BY_COLUMN ? c : channel, WIDTH});
    if (c < tile.end_column)
        work(Vectors<BY_COLUMN, DOWN ? M : 1, false>{
            first + c, step, BY_COLUMN ? c : channel, int(tile.end_column - c)});
}

template <bool BY_COLUMN, class Work>
void for_each_vectors(const Shape& shape, const Tile& tile, Work work) {
    // vectors below one another share their weights, but a narrow one takes only a part of a cache line, the rest of
    // which would be evicted before it is read: all layers may map to the same sets of the first-level cache
    constexpr bool down = BY_COLUMN && sizeof(Floats) == LINE;
    static_assert(down || !BY_COLUMN || UNROLL * WIDTH <= Weights<BY_COLUMN, 1>::BLOCK, "weights lie side by side");
    int64_t r = tile.row;
    if constexpr (down)
        for (; r + UNROLL <= tile.end_row; r += UNROLL)
            for_each_vectors_of_rows<true, UNROLL, true>(shape, tile, r, work);
    for (; r < tile.end_row; r++)
        for_each_vectors_of_rows<BY_COLUMN, down ? 1 : UNROLL, false>(shape, tile, r, work);
}

template <bool BY_COLUMN, int R, class T>
void combine_results(const T* const* layers, int64_t num_layers, const float* const* all_weights,
                     const float* const* biases, T* const* outs, bool begun, bool relu, const Shape& shape,
                     int threads) {
    const Weights<BY_COLUMN, R> weights(all_weights, num_layers, shape.channels);
    const Floats floor = Floats{} + (relu ? 0 : -std::numeric_limits<float>::infinity());
    for_each_tile<BY_COLUMN>(shape, threads, [=, &weights](const Tile& tile, int) {
        for_each_vectors<BY_COLUMN>(shape, tile, [=, &weights](auto vectors) {
            Floats results[R][vectors.size], values[vectors.size];
            for (int j = 0; j < R; j++)
                for (int m = 0; m < vectors.size; m++) {
                    results[j][m] = vectors.parameter(biases[j], m);
                    vectors.prefetch(outs[j], m);
                    if (begun) results[j][m] += vectors.load(outs[j], m);
                }
            const float* weight = weights.of_channel(vectors.channel);
            for (int64_t i = 0; i < num_layers; i++) {
                for (int m = 0; m < vectors.size; m++) {
                    vectors.prefetch(layers[i], m);
                    values[m] = vectors.load(layers[i], m);
                }
                for (int j = 0; j < R; j++, weight += weights.BLOCK)
                    for (int m = 0; m < vectors.size; m++)
                        results[j][m] += vectors.own_parameter(weight, m) * values[m];
            }
            for (int j = 0; j < R; j++)
                for (int m = 0; m < vectors.size; m++)
                    vectors.store(j == 0 && results[j][m] < floor ? floor : results[j][m], outs[j], m);
        });
    });
}

template <bool BY_COLUMN, class T>
void combine(const T* const* layers, int64_t num_layers, const float* const* weights, const float* const* biases,
             T* const* outs, int64_t num_results, bool begun, bool relu, const Shape& shape, int threads) {
    const auto of_results = [&](auto number, int64_t k) {
        combine_results<BY_COLUMN, number>(
            layers, num_layers, weights + k, biases + k, outs + k, begun, relu && k == 0, shape, threads);
    };
    int64_t k = 0;
    for (; k + 4 <= num_results; k += 4) of_results(Int<4>{}, k);
    if (num_results - k == 3) of_results(Int<3>{}, k);
    if (num_results - k == 2) of_results(Int<2>{}, k);
    if (num_results - k == 1) of_results(Int<1>{}, k);
}

// Sums the lanes of a vector.
template <class Lanes>
float sum_of(const Lanes& lanes) {
    if constexpr (sizeof lanes == 2 * sizeof(float)) return lanes[0] + lanes[1];
    else {
        float __attribute__((vector_size(sizeof lanes / 2))) halves[2];
        std::memcpy(halves, &lanes, sizeof lanes);
        return sum_of(halves[0] + halves[1]);
    }
}

// Adds a tile's sums, one for each channel or (contiguous) the lanes of one channel's sum, to the totals, and clears
// them.
template <bool BY_COLUMN>
void move_sums(float* sums, double* totals, const Shape& shape, const Tile& tile) {
    if (BY_COLUMN) {
        for (int64_t k = tile.column; k < tile.end_column; k++) totals[k] += sums[k];
        std::fill(sums + tile.column, sums + tile.end_column, 0.f);
        return;
    }
    totals[tile.row % shape.channels] += sum_of(load<true>(sums, WIDTH));
    std::fill_n(sums, WIDTH, 0.f);
}

// Visits a tile by channel or, BY_COLUMN, by WIDTH channels: each visit is to all vectors of these, a step apart.
template <bool BY_COLUMN, class Work>
void for_each_run(const Shape& shape, const Tile& tile, Work work) {
    const auto run = [&](auto whole, int64_t row, int64_t column, int64_t length, int count) {
        const int64_t first = row * shape.columns + column, step = BY_COLUMN ? shape.columns : WIDTH;
        work(whole, first, step, length, BY_COLUMN ? column : row % shape.channels, count);
    };
    const int64_t end = tile.end_column - (tile.end_column - tile.column) % WIDTH, rest = tile.end_column - end;
    if (BY_COLUMN) {
        for (int64_t c = tile.column; c < end; c += WIDTH)
            run(std::true_type{}, tile.row, c, tile.end_row - tile.row, WIDTH);
        if (rest) run(std::false_type{}, tile.row, end, tile.end_row - tile.row, rest);
        return;
    }
    for (int64_t r = tile.row; r < tile.end_row; r++) {
        if (end > tile.column) run(std::true_type{}, r, tile.column, (end - tile.column) / WIDTH, WIDTH);
        if (rest) run(std::false_type{}, r, end, 1, rest);
    }
}

// Calls add(how many, whether they are the first ones, whether the last, where they begin) for four at a time.
template <class Add>
void in_fours(int64_t number, const Add& add) {
    const auto add_few = [&](auto is_first, int64_t i) {
        if (number - i == 4) add(Int<4>{}, is_first, std::true_type{}, i);
        if (number - i == 3) add(Int<3>{}, is_first, std::true_type{}, i);
        if (number - i == 2) add(Int<2>{}, is_first, std::true_type{}, i);
        if (number - i == 1) add(Int<1>{}, is_first, std::true_type{}, i);
    };
    if (number <= 4) return add_few(std::true_type{}, 0);
    add(Int<4>{}, std::true_type{}, std::false_type{}, 0);
    int64_t i = 4;
    for (; i + 4 < number; i += 4) add(Int<4>{}, std::false_type{}, std::false_type{}, i);
    add_few(std::false_type{}, i);
}

// For R layers, adds N gradients, weighted, to what was begun (FIRST) or to a tile's `results`, and stores the sums in
// `outs` (LAST) or in `results`. Also sums the products of each gradient with each layer's `values`, which are computed
// when FIRST, in `sums`, separately for each pair.
template <bool BY_COLUMN, int N, int R, bool FIRST, bool LAST, class T>
void add_grads(const T* const* grads, const Weights<BY_COLUMN, R>& weights, int64_t first_grad, const T* const* layers,
               const float* const* means, T* const* outs, bool begun, Floats* values, Floats* results, float* sums,
               int64_t num_sums, int64_t layer_sums, const Shape& shape, const Tile& tile) {
    for_each_run<BY_COLUMN>(shape, tile, [=, &weights](auto whole, int64_t first, int64_t step, int64_t length,
                                                       int64_t channel, int count) mutable {
        const float* const grad_weights = weights.of_channel(channel) + first_grad * weights.OF_LAYER;
        Floats dots[R * N] = {};
        const auto add = [&](auto vectors) {
            constexpr int M = vectors.size;
            Floats grad[N * M], value[M], total[M];
            for (int i = 0; i < N; i++)
                for (int m = 0; m < M; m++) {
                    vectors.prefetch(grads[i], m);
                    grad[i * M + m] = vectors.load(grads[i], m);
                }
            for (int j = 0; j < R; j++) {
                for (int m = 0; m < M; m++) {
                    if (FIRST) {
                        vectors.prefetch(layers[j], m);
                        vectors.prefetch(outs[j], m);
                    }
                    value[m] = FIRST ? vectors.load(layers[j], m) - vectors.parameter(means[j]) : values[j * M + m];
                    total[m] = !FIRST ? results[j * M + m] : begun ? vectors.load(outs[j], m) : Floats{};
                    if (FIRST && !LAST) values[j * M + m] = value[m];
                    keep_in_register(value[m]);
                }
                for (int i = 0; i < N; i++) {
                    const Floats weight = vectors.own_parameter(grad_weights + (i * R + j) * weights.BLOCK);
                    for (int m = 0; m < M; m++) {
                        total[m] += weight * grad[i * M + m];
                        dots[j * N + i] += grad[i * M + m] * value[m];
                    }
                }
                for (int m = 0; m < M; m++)
                    if (LAST) vectors.store(total[m], outs[j], m);
                    else results[j * M + m] = total[m];
            }
            values += R * M;
            results += R * M;
        };
        int64_t v = 0;
        for (; R == 1 && v + UNROLL <= length; v += UNROLL)
            add(Vectors<BY_COLUMN, UNROLL, whole>{first + v * step, step, channel, count});
        for (; v < length; v++) add(Vectors<BY_COLUMN, 1, whole>{first + v * step, step, channel, count});
        for (int j = 0; j < R; j++)
            for (int i = 0; i < N; i++) {
                float* const sum = sums + j * layer_sums + i * num_sums + (BY_COLUMN ? channel : 0);
                store<true>(load<true>(sum, WIDTH) + dots[j * N + i], sum, WIDTH);
            }
    });
}

// dots: zeros, [R, threads, num_grads, channels]
template <bool BY_COLUMN, int R, class T>
void combine_backward_layers(const T* const* grads, int64_t num_grads, const float* const* all_weights,
                             const T* const* layers, const float* const* means, T* const* outs, bool begun,
                             double* dots, const Shape& shape, int threads) {
    const int64_t num_sums = BY_COLUMN ? (shape.channels + WIDTH - 1) / WIDTH * WIDTH : WIDTH;
    const int64_t layer_sums = num_grads * num_sums, thread_sums = R * layer_sums + APART;
    std::vector<float> all_sums(threads * thread_sums);
    float* const first_sums = all_sums.data();
    // with long rows, a part of a tile would have too few rows to sum in registers
    const int64_t max_columns = R == 1 || shape.columns <= SHORT_ROW ? COLUMNS : LINE / int64_t(sizeof(T));
    const Weights<BY_COLUMN, R> weights(all_weights, num_grads, shape.channels);
    for_each_tile<BY_COLUMN>(shape, threads, [=, &weights](const Tile& whole, int thread) {
        float* const sums = first_sums + thread * thread_sums;
        for_each_part(whole, [=, &weights](const Tile& tile) {
            Floats values[R * VECTORS], results[R * VECTORS];
            const auto add = [&](auto number, auto is_first, auto is_last, int64_t i) {
                add_grads<BY_COLUMN, number, R, is_first, is_last>(
                    grads + i, weights, i, layers, means, outs, begun, values, results, sums + i * num_sums, num_sums,
                    layer_sums, shape, tile);
            };
            in_fours(num_grads, add);
        });
        for (int j = 0; j < R; j++)
            for (int64_t i = 0; i < num_grads; i++)
                move_sums<BY_COLUMN>(
                    sums + j * layer_sums + i * num_sums,
                    dots + ((j * threads + thread) * num_grads + i) * shape.channels, shape, whole);
    }, max_columns);
}

template <bool BY_COLUMN, class T>
void combine_backward(const T* const* grads, int64_t num_grads, const float* const* weights, const T* const* layers,
                      const float* const* means, T* const* outs, int64_t num_layers, bool begun, double* dots,
                      const Shape& shape, int threads) {
    const auto of_layers = [&](auto number, int64_t j) {
        combine_backward_layers<BY_COLUMN, number>(
            grads, num_grads, weights + j, layers + j, means + j, outs + j, begun,
            dots + j * threads * num_grads * shape.channels, shape, threads);
    };
    int64_t j = 0;
    for (; j + 4 <= num_layers; j += 4) of_layers(Int<4>{}, j);
    for (; j < num_layers; j++) of_layers(Int<1>{}, j);
}

// Calls work(image, the shape of one, where it begins, thread) for every image.
template <class Work>
void for_each_image(const Shape& shape, int64_t images, int threads, const Work& work) {
    const Shape one{shape.rows / images, shape.columns, shape.channels};
#pragma omp parallel for num_threads(threads)
    for (int thread = 0; thread < threads; thread++)
        for (int64_t n = images * thread / threads; n < images * (thread + 1) / threads; n++)
            work(n, one, n * one.rows * one.columns, thread);
}

template <class P>
std::vector<P> shifted(P const* pointers, int64_t number, int64_t by) {
    std::vector<P> results(pointers, pointers + number);
    for (P& pointer : results) pointer += by;
    return results;
}

// Multiplies weights [of, channels] by one image's scales, [of, images].
std::vector<float> scaled(const float* weights, const float* scales, int64_t of, int64_t images, int64_t image,
                          int64_t channels) {
    std::vector<float> results(of * channels);
    for (int64_t i = 0; i < of; i++)
        for (int64_t k = 0; k < channels; k++)
            results[i * channels + k] = weights[i * channels + k] * scales[i * images + image];
    return results;
}

// biases: [images, channels] of each result
template <bool BY_COLUMN, class T>
void combine_images(const T* const* layers, int64_t num_layers, const float* const* weights,
                    const float* const* biases, const float* const* scales, int64_t images, T* const* outs,
                    int64_t num_results, bool begun, bool relu, const Shape& shape, int threads) {
    for_each_image(shape, images, threads, [=](int64_t n, const Shape& one, int64_t begin, int) {
        const auto from = shifted(layers, num_layers, begin);
        const auto of = shifted(biases, num_results, n * one.channels);
        const auto to = shifted(outs, num_results, begin);
        std::vector<std::vector<float>> image_weights;
        std::vector<const float*> pointers;
        for (int64_t k = 0; k < num_results; k++) {
            image_weights.push_back(scaled(weights[k], scales[k], num_layers, images, n, one.channels));
            pointers.push_back(image_weights[k].data());
        }
        combine<BY_COLUMN>(
            from.data(), num_layers, pointers.data(), of.data(), to.data(), num_results, begun, relu, one, 1);
    });
}

template <bool BY_COLUMN, class T>
void combine_backward_images(const T* const* grads, int64_t num_grads, const float* const* weights,
                             const float* const* scales, int64_t images, const T* const* layers,
                             const float* const* means, T* const* outs, int64_t num_layers, bool begun, double* dots,
                             const Shape& shape, int threads) {
    for_each_image(shape, images, threads, [=](int64_t n, const Shape& one, int64_t begin, int thread) {
        const auto from = shifted(grads, num_grads, begin);
        const auto of = shifted(layers, num_layers, begin);
        const auto to = shifted(outs, num_layers, begin);
        std::vector<double> image_dots(num_layers * num_grads * one.channels);
        std::vector<std::vector<float>> image_weights;
        std::vector<const float*> pointers;
        for (int64_t j = 0; j < num_layers; j++) {
            image_weights.push_back(scaled(weights[j], scales[j], num_grads, images, n, one.channels));
            pointers.push_back(image_weights[j].data());
        }
        combine_backward<BY_COLUMN>(from.data(), num_grads, pointers.data(), of.data(), means, to.data(), num_layers,
                                    begun, image_dots.data(), one, 1);
        for (int64_t j = 0; j < num_layers; j++)
            for (int64_t i = 0; i < num_grads; i++)
                for (int64_t k = 0; k < one.channels; k++)
                    dots[((j * threads + thread) * num_grads + i) * one.channels + k] +=
                        scales[j][i * images + n] * image_dots[(j * num_grads + i) * one.channels + k];
    });
}

struct Pair {
    Floats first, second;
};

// Sums two terms of every element over its channel, [2, channels]; terms(vector) gives both for a vector of elements.
template <bool BY_COLUMN, class Terms>
std::vector<double> channel_sums(const Shape& shape, int threads, const Terms& terms) {
    const int64_t stride = 2 * shape.channels + APART;
    std::vector<double> totals(threads * stride);
    // contiguous rows may be short: those of a channel in several images are summed together
    const int64_t images = BY_COLUMN ? 1 : shape.rows / shape.channels;
    const int64_t together = std::clamp<int64_t>(VECTORS * WIDTH / shape.columns, 1, images);
    const int64_t groups = (images + together - 1) / together, image = shape.rows / images * shape.columns;
    const Shape of_groups{shape.rows / images * groups, shape.columns, shape.channels};
    for_each_tile<BY_COLUMN>(of_groups, threads, [=, &totals](const Tile& tile, int thread) {
        double *const first_totals = &totals[thread * stride], *const second_totals = first_totals + shape.channels;
        const int64_t first_image = BY_COLUMN ? 0 : tile.row / shape.channels * together;
        const int64_t end_image = std::min(first_image + together, images);
        // adds `size` vectors side by side, `length` times, each time `distance` elements further, in each image
        const auto add = [&](auto size, auto whole, int64_t begin, int64_t distance, int64_t length, int64_t channel,
                             int count) {
            Floats first[size], second[size];
            for (int n = 0; n < size; n++) first[n] = second[n] = Floats{};
            for (int64_t j = first_image; j < end_image; j++)
                for (int64_t i = 0; i < length; i++)
                    for (int n = 0; n < size; n++) {
                        const int64_t lane = n * WIDTH;
                        const Pair pair = terms(Vectors<BY_COLUMN, 1, whole>{
                            begin + j * image + i * distance + lane, 0, channel + (BY_COLUMN ? lane : 0), count});
                        first[n] += pair.first;
                        second[n] += pair.second;
                    }
            if constexpr (BY_COLUMN) {
                float lanes[2][size * WIDTH];
                std::memcpy(lanes[0], first, sizeof first);
                std::memcpy(lanes[1], second, sizeof second);
                for (int k = 0; k < (whole ? size * WIDTH : count); k++) {
                    first_totals[channel + k] += lanes[0][k];
                    second_totals[channel + k] += lanes[1][k];
                }
            } else {
                for (int n = 1; n < size; n++) {
                    first[0] += first[n];
                    second[0] += second[n];
                }
                first_totals[channel] += sum_of(first[0]);
                second_totals[channel] += sum_of(second[0]);
            }
        };
        const int64_t of_row = BY_COLUMN ? 0 : tile.row % shape.channels, rows = tile.end_row - tile.row;
        const int64_t row = (BY_COLUMN ? tile.row : of_row) * shape.columns;
        int64_t c = tile.column;
        if constexpr (BY_COLUMN) {
            const auto add_all = [&](auto size) {
                for (; c + size * WIDTH <= tile.end_column; c += size * WIDTH)
                    add(size, std::true_type{}, row + c, shape.columns, rows, c, WIDTH);
            };
            add_all(Int<SUMMED<true>>{});
            add_all(Int<SUMMED<true> / 2>{});
            add_all(Int<1>{});
        } else {
            constexpr int64_t across = SUMMED<false> * WIDTH;
            const int64_t length = (tile.end_column - c) / across;
            if (length) add(Int<SUMMED<false>>{}, std::true_type{}, row + c, across, length, of_row, WIDTH);
            c += length * across;
            const int64_t rest = (tile.end_column - c) / WIDTH;
            if (rest) add(Int<1>{}, std::true_type{}, row + c, WIDTH, rest, of_row, WIDTH);
            c += rest * WIDTH;
        }
        if (c < tile.end_column)
            add(Int<1>{}, std::false_type{}, row + c, shape.columns, rows, BY_COLUMN ? c : of_row,
                int(tile.end_column - c));
    });
    for (int thread = 1; thread < threads; thread++)
        for (int64_t k = 0; k < 2 * shape.channels; k++) totals[k] += totals[thread * stride + k];
    return totals;
}

template <bool BY_COLUMN, class T>
void moments(const T* x, float* mean, float* var, const Shape& shape, int threads) {
    // sums are of distances from one element, since the squares of a large mean would swallow a small variance
    std::vector<float> origin(shape.channels);
    for (int64_t k = 0; k < shape.channels; k++)
        origin[k] = load<false>(x + (BY_COLUMN ? k : k * shape.columns), 1)[0];
    const float* from = origin.data();
    const auto sums = channel_sums<BY_COLUMN>(shape, threads, [=](auto vector) {
        vector.prefetch(x, 0);
        const Floats distance = vector.load(x, 0) - vector.parameter(from);
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
                       const float* invstd, bool training, bool relu, T* out, float* weight_grad, float* bias_grad,
                       const Shape& shape, int threads) {
    std::vector<float> of_channels(4 * shape.channels);
    float *const scale = of_channels.data(), *const shift = scale + shape.channels;
    float *const x_scale = shift + shape.channels, *const offset = x_scale + shape.channels;
    for (int64_t k = 0; k < shape.channels; k++) {
        scale[k] = weight[k] * invstd[k];
        shift[k] = bias[k] - scale[k] * mean[k];
    }
    const Floats floor = Floats{} + (relu ? 0 : -std::numeric_limits<float>::infinity());
    const auto relu_grad = [=](auto vectors, int m, Floats values) {
        const Floats result = vectors.parameter(shift, m) + vectors.parameter(scale, m) * values;
        return result <= floor ? Floats{} : vectors.load(grads, m);
    };
    const auto sums = channel_sums<BY_COLUMN>(shape, threads, [=](auto vector) {
        const Floats values = vector.load(x, 0), grad = relu_grad(vector, 0, values);
        return Pair{grad, grad * (values - vector.parameter(mean))};
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
                const Floats centred = vectors.parameter(x_scale, m) * values + vectors.parameter(offset, m);
                vectors.store(vectors.parameter(scale, m) * grad + centred, out, m);
            }
        });
    });
}

}  // namespace

using Element = ELEMENT;  // float or bfloat16, given by the compiler's caller

extern "C" {

// scales: for each result, the factors of each layer's images, [num_layers, images], or null
void combine(const Element* const* layers, int64_t num_layers, const float* const* weights, const float* const* biases,
             const float* const* scales, int64_t images, Element* const* outs, int64_t num_results, int64_t begun,
             int64_t relu, const Shape* shape, int64_t by_column, int64_t threads) {
    if (scales)
        return (by_column ? combine_images<true, Element> : combine_images<false, Element>)(
            layers, num_layers, weights, biases, scales, images, outs, num_results, begun, relu, *shape, threads);
    (by_column ? combine<true, Element> : combine<false, Element>)(
        layers, num_layers, weights, biases, outs, num_results, begun, relu, *shape, threads);
}

// scales: for each layer, the factors of its images in each result, [num_grads, images], or null
void combine_backward(const Element* const* grads, int64_t num_grads, const float* const* weights,
                      const float* const* scales, int64_t images, const Element* const* layers,
                      const float* const* means, Element* const* outs, int64_t num_layers, int64_t begun, double* dots,
                      const Shape* shape, int64_t by_column, int64_t threads) {
    if (scales)
        return (by_column ? combine_backward_images<true, Element> : combine_backward_images<false, Element>)(
            grads, num_grads, weights, scales, images, layers, means, outs, num_layers, begun, dots, *shape, threads);
    (by_column ? combine_backward<true, Element> : combine_backward<false, Element>)(
        grads, num_grads, weights, layers, means, outs, num_layers, begun, dots, *shape, threads);
}

void moments(const Element* x, float* mean, float* var, const Shape* shape, int64_t by_column, int64_t threads) {
    (by_column ? moments<true, Element> : moments<false, Element>)(x, mean, var, *shape, threads);
}

void norm_act_backward(const Element* grads, const Element* x, const float* weight, const float* bias,
                       const float* mean, const float* invstd, int64_t training, int64_t relu, Element* out,
                       float* weight_grad, float* bias_grad, const Shape* shape, int64_t by_column, int64_t threads) {
    (by_column ? norm_act_backward<true, Element> : norm_act_backward<false, Element>)(
        grads, x, weight, bias, mean, invstd, training, relu, out, weight_grad, bias_grad, *shape, threads);
}

}
