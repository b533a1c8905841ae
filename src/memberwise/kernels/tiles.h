// Tiles of a convolution of 3 x 3 taps, there and back: numbers, gradients and weights become points, which are
// multiplied one by one, and these results, or sums (Winograd, 1980; Lavin, Gray: Fast Algorithms for Convolutional
// Neural Networks, CVPR 2016), by a scheme S of `schemes.h`. On the way numbers of W channels lie side by side.

#include <memory>

namespace {

constexpr int LANES = W<float>;
constexpr int TAPS = 9;
constexpr int WEIGHTS = KINDS * KINDS;  // points of 3 x 3 weights
template <class S> constexpr int PRODUCTS = S::POINTS * S::POINTS;  // points of a tile
constexpr int64_t PANEL = WIDE<float>;
constexpr int64_t LINE = BYTES / sizeof(float);

#if defined(__AVX512F__)
inline V32 some(const float* p, int n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline void put(float* p, V32 x, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, x); }
#else
inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V32 some(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
inline void put(float* p, V32 x, int n) { _mm256_maskstore_ps(p, first(n), x); }
#endif

inline int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// `count` numbers of each of up to LANES lanes, `apart` from each other: turned over, number by number
inline void take(const float* from, int64_t apart, int lanes, int count, V32 (&x)[LANES]) {
    for (int k = 0; k < LANES; k++) x[k] = k < lanes ? some(from + k * apart, count) : each(0.f);
    turn<float>(x);
}

// the way back
inline void give(V32 (&x)[LANES], int count, float* to, int64_t apart, int lanes) {
    turn<float>(x);
    for (int k = 0; k < lanes; k++) put(to + k * apart, x[k], count);
}

struct Images {  // (images, channels, height, width), without gaps; the channels of one group are looked at
    float* data;
    int64_t all, channels, height, width;
    float* plane(int64_t image, int64_t channel) const { return data + (image * all + channel) * height * width; }
};

struct Edges {  // how much lies before the first row and the first column
    int64_t top, left;
};

// rows [y, y + rows) and `columns` columns from x <= 0 of up to LANES planes, lane by lane; what lies outside is 0
void spread(const Images& from, const float* planes, int lanes, int64_t y, int64_t rows, int64_t x, int64_t columns,
            float* to) {
    std::fill_n(to, rows * columns * LANES, 0.f);
    const int64_t plane = from.height * from.width, end = least(y + rows, from.height) * from.width;
    int64_t row = y < 0 ? 0 : y, column = 0;
    for (int64_t p = row * from.width; p < end; p += LANES) {
        const int count = int(least(LANES, end - p));
        V32 number[LANES];
        for (int k = 0; k < lanes; k++) __builtin_prefetch(planes + (LANES + k) * plane + p);  // what comes next
        take(planes + p, plane, lanes, count, number);
        for (int k = 0; k < count; k++) {
            store(to + ((row - y) * columns + column - x) * LANES, number[k]);
            if (++column == from.width) column = 0, row++;
        }
    }
}

// the way back: `rows` x width numbers, lane by lane, to rows from y on of up to LANES planes
void gather(const Images& to, float* planes, int lanes, int64_t y, int64_t rows, const float* from) {
    const int64_t plane = to.height * to.width, begin = y * to.width, count = rows * to.width;
    for (int64_t p = 0; p < count; p += LANES) {
        const int width = int(least(LANES, count - p));
        V32 number[LANES];
        for (int k = 0; k < LANES; k++) number[k] = k < width ? load(from + (p + k) * LANES) : each(0.f);
        give(number, width, planes + begin + p, plane, lanes);
    }
}

struct Tiles {  // of the results: rows of them follow each other, image after image
    int64_t images, high, wide;
    Tiles(const Images& out, int64_t images, Edges before, int64_t side)
        : images(images), high((before.top + out.height + side - 1) / side),
          wide((before.left + out.width + side - 1) / side) {}
    int64_t rows() const { return images * high; }
};

// calls `run(image, row of tiles, rows, first tile)` for each image's part of the rows [begin, end)
template <class Run>
void segments(const Tiles& tiles, int64_t begin, int64_t end, const Run& run) {
    for (int64_t row = begin; row < end;) {
        const int64_t image = row / tiles.high, own = least(end, (image + 1) * tiles.high) - row;
        run(image, row - image * tiles.high, own, (row - begin) * tiles.wide);
        row += own;
    }
}

// matrices of (tiles, channels); a line lies between two, for 16 at one distance of a page share a set of the cache
struct Points {
    float* data;
    int64_t pitch, size;
    static int64_t apart(int64_t numbers) { return whole(numbers, LINE) + LINE; }
    Points(float* data, int64_t tiles, int64_t pitch) : data(data), pitch(pitch), size(apart(tiles * pitch)) {}
    float* end(int points) const { return data + points * size; }
    float* at(int point, int64_t tile, int64_t channel) const { return data + point * size + tile * pitch + channel; }
};

template <int IN, int OUT> using Along = void (*)(const V32 (&)[IN], V32 (&)[OUT]);

// a transformation along both dimensions: x, of IN x IN numbers, becomes T x T^T
template <int IN, int OUT>
inline void both_ways(const V32 (&x)[IN][IN], V32 (&y)[OUT][OUT], Along<IN, OUT> along) {
    V32 half[OUT][IN];
    for (int b = 0; b < IN; b++) {
        V32 column[IN], made[OUT];
        for (int a = 0; a < IN; a++) column[a] = x[a][b];
        along(column, made);
        for (int a = 0; a < OUT; a++) half[a][b] = made[a];
    }
    for (int a = 0; a < OUT; a++) along(half[a], y[a]);
}

// of each tile, whose numbers begin `step` apart, the points
template <int IN, int POINTS>
inline void points_of(const float* d, int64_t columns, int64_t rows, int64_t wide, int64_t step, const Points& to,
                      int64_t tile, int64_t lane, Along<IN, POINTS> along) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < wide; j++, tile++) {
            V32 x[IN][IN], y[POINTS][POINTS];
            for (int a = 0; a < IN; a++)
                for (int b = 0; b < IN; b++) x[a][b] = load(d + ((step * i + a) * columns + step * j + b) * LANES);
            both_ways(x, y, along);
            for (int k = 0; k < POINTS * POINTS; k++) store(to.at(k, tile, lane), y[k / POINTS][k % POINTS]);
        }
}

// of each tile, the results that lie in `high` x `width`, which begin at (top, left) of the first tile; what it adds to
// `check` is NaN if one of them is not finite
template <int POINTS, int OUT>
inline void results_of(const Points& from, int64_t tile, int64_t lane, int64_t rows, int64_t wide, Edges edges,
                       int64_t high, int64_t width, float* to, V32& check, Along<POINTS, OUT> along) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < wide; j++, tile++) {
            V32 x[POINTS][POINTS], y[OUT][OUT];
            for (int k = 0; k < POINTS * POINTS; k++) x[k / POINTS][k % POINTS] = load(from.at(k, tile, lane));
            both_ways(x, y, along);
            for (int a = 0; a < OUT; a++)
                for (int b = 0; b < OUT; b++) {
                    const int64_t row = OUT * i + a - edges.top, column = OUT * j + b - edges.left;
                    if (row < 0 || row >= high || column < 0 || column >= width) continue;
                    check = fma(y[a][b], each(0.f), check);
                    store(to + (row * width + column) * LANES, y[a][b]);
                }
        }
}

struct Taps {  // weights, as (lanes, rows, 9), whichever of them are the results' channels
    float* data;
    int64_t lane, row;
    bool rotated;
};

// the points of up to LANES lanes and `rows` rows
template <class S>
void weights_of(const Taps& w, int64_t lane, int lanes, int64_t row, int64_t rows, float* to, int64_t size) {
    for (int64_t r = 0; r < rows; r++) {
        const float* from = w.data + lane * w.lane + (row + r) * w.row;
        for (int k = 0; k < lanes; k++) __builtin_prefetch(from + k * w.lane + 4 * w.row);  // a row to come
        V32 tap[3][3], y[KINDS][KINDS], x[LANES];
        for (int base = 0; base < TAPS; base += LANES) {
            const int count = int(least(LANES, TAPS - base));
            take(from + base, w.lane, lanes, count, x);
            for (int k = 0; k < count; k++) {
                const int at = w.rotated ? TAPS - 1 - base - k : base + k;
                tap[at / 3][at % 3] = x[k];
            }
        }
        both_ways(tap, y, S::of_weights);
        for (int k = 0; k < WEIGHTS; k++) store(to + k * size + r * PANEL, y[k / KINDS][k % KINDS]);
    }
}

// the 9 numbers of up to LANES lanes
template <class S>
void taps_of(const float* s, int64_t size, float* to, int lanes, V32& check) {
    V32 x[KINDS][KINDS], tap[3][3], y[LANES];
    for (int k = 0; k < WEIGHTS; k++) x[k / KINDS][k % KINDS] = load(s + k * size);
    both_ways(x, tap, S::of_sums);
    for (int k = 0; k < TAPS; k++) check = fma(tap[k / 3][k % 3], each(0.f), check);
    for (int base = 0; base < TAPS; base += LANES) {
        const int count = int(least(LANES, TAPS - base));
        for (int k = 0; k < LANES; k++) y[k] = k < count ? tap[(base + k) / 3][(base + k) % 3] : each(0.f);
        give(y, count, to + base, TAPS, lanes);
    }
}

inline bool finite(V32 check) {
    alignas(64) float x[LANES];
    store(x, check);
    float sum = 0;
    for (float one : x) sum += one;
    return sum == 0;
}

// the weights' point that a tile's is multiplied with
template <class S>
constexpr int weight_of(int point) {
    return S::kind(point / S::POINTS) * KINDS + S::kind(point % S::POINTS);
}

// what of the results' tiles is worked on together: whole rows of them
template <class S>
struct Blocks {
    const Edges around, before;  // of the numbers; of the results: what of the tiles is none
    const Tiles tiles;
    const int64_t step, count, most;
    const int64_t columns;  // of the numbers: for `spread` all that there are, if no result reads the last one, too
    Blocks(const Images& results, int64_t images, Edges around, Edges before, int64_t size)
        : around(around), before(before), tiles(results, images, before, S::OUT),
          step(std::max<int64_t>(1, size / tiles.wide)), count((tiles.rows() + step - 1) / step),
          most(least(step, tiles.rows()) * tiles.wide), columns(S::STEP * tiles.wide + 2) {}
    int64_t begin(int64_t block) const { return block * step; }
    int64_t end(int64_t block) const { return least(begin(block) + step, tiles.rows()); }
    int64_t size(int64_t block) const { return (end(block) - begin(block)) * tiles.wide; }
    int64_t high(int64_t rows) const { return S::STEP * rows + S::IN - S::STEP; }
    // numbers that `spread` makes, or `gather` takes, at a time
    int64_t strip() const { return std::max(high(step) * columns, S::OUT * S::OUT * step * tiles.wide) * LANES; }

    // of all channels
    void numbers(const Images& in, int64_t block, float* strip, const Points& to) const {
        segments(tiles, begin(block), end(block), [&](int64_t image, int64_t row, int64_t rows, int64_t tile) {
            for (int64_t lane = 0; lane < in.channels; lane += LANES) {
                spread(in, in.plane(image, lane), int(least(LANES, in.channels - lane)), S::STEP * row - around.top,
                       high(rows), -around.left, columns, strip);
                points_of(strip, columns, rows, tiles.wide, S::STEP, to, tile, lane, S::of_numbers);
            }
        });
    }

    // of the channels [first, last)
    void gradients(const Images& grad, int64_t first, int64_t last, int64_t block, float* strip,
                   const Points& to) const {
        const int64_t wide = S::OUT * tiles.wide;
        segments(tiles, begin(block), end(block), [&](int64_t image, int64_t row, int64_t rows, int64_t tile) {
            for (int64_t lane = first; lane < last; lane += LANES) {
                spread(grad, grad.plane(image, lane), int(least(LANES, last - lane)), S::OUT * row, S::OUT * rows, 0,
                       wide, strip);
                points_of(strip, wide, rows, tiles.wide, S::OUT, to, tile, lane - first, S::of_gradients);
            }
        });
    }

    void results(const Points& from, int64_t first, int64_t last, int64_t block, float* strip, const Images& out,
                 V32& check) const {
        segments(tiles, begin(block), end(block), [&](int64_t image, int64_t row, int64_t rows, int64_t tile) {
            const int64_t begin = S::OUT * row - before.top, y = std::max<int64_t>(begin, 0);
            const int64_t high = least(begin + S::OUT * rows, out.height) - y;
            for (int64_t lane = first; lane < last; lane += LANES) {
                results_of(from, tile, lane - first, rows, tiles.wide, {y - begin, before.left}, high, out.width, strip,
                           check, S::of_results);
                gather(out, out.plane(image, lane), int(least(LANES, last - lane)), y, high, strip);
            }
        });
    }
};

}  // namespace
