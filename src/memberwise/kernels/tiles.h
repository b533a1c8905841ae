// Tiles of 2 x 2 results out of 4 x 4 numbers and 3 x 3 taps, F(2 x 2, 3 x 3), there and back: results, their
// gradients, numbers and weights become 16 points each, which are multiplied one by one (Winograd, 1980; Lavin, Gray:
// Fast Algorithms for Convolutional Neural Networks, CVPR 2016). On the way numbers of W channels lie side by side.

#include <memory>

namespace {

constexpr int LANES = W<float>;
constexpr int POINTS = 16;  // products of a tile
constexpr int TAPS = 9;
constexpr int64_t PANEL = WIDE<float>;
constexpr int64_t LINE = 16;  // numbers in a line of the cache

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

// rows [y, y + rows) and `columns` columns from x of up to LANES planes, lane by lane; what lies outside is 0
void spread(const Images& from, const float* planes, int lanes, int64_t y, int64_t rows, int64_t x, int64_t columns,
            float* to) {
    std::fill_n(to, rows * columns * LANES, 0.f);
    const int64_t plane = from.height * from.width, end = least(y + rows, from.height) * from.width;
    int64_t row = y < 0 ? 0 : y, column = 0;
    for (int64_t p = row * from.width; p < end; p += LANES) {
        const int count = int(least(LANES, end - p));
        V32 number[LANES];
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
    Tiles(const Images& out, int64_t images) : images(images), high((out.height + 1) / 2), wide((out.width + 1) / 2) {}
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

// 16 matrices of (tiles, channels); a line lies between two, for 16 at one distance of a page share a set of the cache
struct Points {
    float* data;
    int64_t pitch, size;
    static int64_t apart(int64_t numbers) { return whole(numbers, LINE) + LINE; }
    static int64_t all(int64_t tiles, int64_t pitch) { return POINTS * apart(tiles * pitch); }
    Points(float* data, int64_t tiles, int64_t pitch) : data(data), pitch(pitch), size(apart(tiles * pitch)) {}
    float* at(int point, int64_t tile, int64_t channel) const { return data + point * size + tile * pitch + channel; }
};

// a transformation along both dimensions: x, of IN x IN numbers, becomes T x T^T
template <int IN, int OUT, class Along>
inline void both_ways(const V32 (&x)[IN][IN], V32 (&y)[OUT][OUT], Along along) {
    V32 half[OUT][IN];
    for (int b = 0; b < IN; b++) {
        V32 column[IN], made[OUT];
        for (int a = 0; a < IN; a++) column[a] = x[a][b];
        along(column, made);
        for (int a = 0; a < OUT; a++) half[a][b] = made[a];
    }
    for (int a = 0; a < OUT; a++) along(half[a], y[a]);
}

// the five matrices T of F(2 x 2, 3 x 3), applied to one column: B^T, A, A^T, G and G^T
inline void of_numbers(const V32 (&x)[4], V32 (&y)[4]) {
    y[0] = x[0] - x[2], y[1] = x[1] + x[2], y[2] = x[2] - x[1], y[3] = x[1] - x[3];
}
inline void of_gradients(const V32 (&x)[2], V32 (&y)[4]) {
    y[0] = x[0], y[1] = x[0] + x[1], y[2] = x[0] - x[1], y[3] = -x[1];
}
inline void of_results(const V32 (&x)[4], V32 (&y)[2]) { y[0] = x[0] + x[1] + x[2], y[1] = x[1] - x[2] - x[3]; }
inline void of_weights(const V32 (&x)[3], V32 (&y)[4]) {
    const V32 ends = each(0.5f) * (x[0] + x[2]), middle = each(0.5f) * x[1];
    y[0] = x[0], y[1] = ends + middle, y[2] = ends - middle, y[3] = x[2];
}
inline void of_sums(const V32 (&x)[4], V32 (&y)[3]) {
    const V32 both = each(0.5f) * (x[1] + x[2]);
    y[0] = x[0] + both, y[1] = each(0.5f) * (x[1] - x[2]), y[2] = both + x[3];
}

// of each tile, whose numbers begin two apart, the points
template <int IN, class Along>
void points_of(const float* d, int64_t columns, int64_t rows, int64_t wide, const Points& to, int64_t tile,
               int64_t lane, Along along) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < wide; j++, tile++) {
            V32 x[IN][IN], y[4][4];
            for (int a = 0; a < IN; a++)
                for (int b = 0; b < IN; b++) x[a][b] = load(d + ((2 * i + a) * columns + 2 * j + b) * LANES);
            both_ways(x, y, along);
            for (int k = 0; k < POINTS; k++) store(to.at(k, tile, lane), y[k / 4][k % 4]);
        }
}

// of each tile, the results, in rows of `width`; what it adds to `check` is NaN if one of them is not finite
void results_of(const Points& from, int64_t tile, int64_t lane, int64_t rows, int64_t high, int64_t wide, int64_t width,
                float* to, V32& check) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < wide; j++, tile++) {
            V32 x[4][4], y[2][2];
            for (int k = 0; k < POINTS; k++) x[k / 4][k % 4] = load(from.at(k, tile, lane));
            both_ways(x, y, of_results);
            for (int a = 0; a < 2 && 2 * i + a < high; a++) {
                float* at = to + ((2 * i + a) * width + 2 * j) * LANES;
                check = fma(y[a][0], each(0.f), fma(y[a][1], each(0.f), check));
                store(at, y[a][0]);
                if (2 * j + 1 < width) store(at + LANES, y[a][1]);
            }
        }
}

struct Taps {  // weights, as (lanes, rows, 9), whichever of them are the results' channels
    float* data;
    int64_t lane, row;
    bool rotated;
};

// the points of up to LANES lanes and `rows` rows
void weights_of(const Taps& w, int64_t lane, int lanes, int64_t row, int64_t rows, float* to, int64_t size) {
    for (int64_t r = 0; r < rows; r++) {
        const float* from = w.data + lane * w.lane + (row + r) * w.row;
        V32 tap[3][3], y[4][4], x[LANES];
        for (int base = 0; base < TAPS; base += LANES) {
            const int count = int(least(LANES, TAPS - base));
            take(from + base, w.lane, lanes, count, x);
            for (int k = 0; k < count; k++) {
                const int at = w.rotated ? TAPS - 1 - base - k : base + k;
                tap[at / 3][at % 3] = x[k];
            }
        }
        both_ways(tap, y, of_weights);
        for (int k = 0; k < POINTS; k++) store(to + k * size + r * PANEL, y[k / 4][k % 4]);
    }
}

// the 9 numbers of up to LANES lanes
void taps_of(const float* s, int64_t size, float* to, int lanes, V32& check) {
    V32 x[4][4], tap[3][3], y[LANES];
    for (int k = 0; k < POINTS; k++) x[k / 4][k % 4] = load(s + k * size);
    both_ways(x, tap, of_sums);
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

// what of the results' tiles is worked on together: whole rows of them
struct Blocks {
    const Tiles tiles;
    const int64_t top, left;  // what lies around the numbers
    const int64_t step, count, most, columns;
    Blocks(const Images& results, int64_t images, int64_t top, int64_t left, int64_t size)
        : tiles(results, images), top(top), left(left), step(std::max<int64_t>(1, size / tiles.wide)),
          count((tiles.rows() + step - 1) / step), most(least(step, tiles.rows()) * tiles.wide),
          columns(2 * tiles.wide + 2) {}
    int64_t begin(int64_t block) const { return block * step; }
    int64_t end(int64_t block) const { return least(begin(block) + step, tiles.rows()); }
    int64_t size(int64_t block) const { return (end(block) - begin(block)) * tiles.wide; }
    int64_t strip() const { return (2 * step + 2) * columns * LANES; }  // numbers that `spread` makes at a time

    void numbers(const Images& in, int64_t block, float* strip, const Points& to) const {
        for (int64_t lane = 0; lane < in.channels; lane += LANES)
            segments(tiles, begin(block), end(block), [&](int64_t image, int64_t row, int64_t rows, int64_t tile) {
                spread(in, in.plane(image, lane), int(least(LANES, in.channels - lane)), 2 * row - top, 2 * rows + 2,
                       -left, columns, strip);
                points_of<4>(strip, columns, rows, tiles.wide, to, tile, lane, of_numbers);
            });
    }

    // of the channels [first, last)
    void gradients(const Images& grad, int64_t first, int64_t last, int64_t block, float* strip,
                   const Points& to) const {
        for (int64_t lane = first; lane < last; lane += LANES)
            segments(tiles, begin(block), end(block), [&](int64_t image, int64_t row, int64_t rows, int64_t tile) {
                spread(grad, grad.plane(image, lane), int(least(LANES, last - lane)), 2 * row, 2 * rows, 0, columns,
                       strip);
                points_of<2>(strip, columns, rows, tiles.wide, to, tile, lane - first, of_gradients);
            });
    }

    void results(const Points& from, int64_t first, int64_t last, int64_t block, float* strip, const Images& out,
                 V32& check) const {
        for (int64_t lane = first; lane < last; lane += LANES)
            segments(tiles, begin(block), end(block), [&](int64_t image, int64_t row, int64_t rows, int64_t tile) {
                const int64_t high = least(2 * rows, out.height - 2 * row);
                results_of(from, tile, lane - first, rows, high, tiles.wide, out.width, strip, check);
                gather(out, out.plane(image, lane), int(least(LANES, last - lane)), 2 * row, high, strip);
            });
    }
};

}  // namespace
