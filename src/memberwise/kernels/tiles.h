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
        V32 lane[LANES];
        for (int k = 0; k < LANES; k++) lane[k] = k < lanes ? some(planes + k * plane + p, count) : each(0.f);
        turn<float>(lane);
        for (int k = 0; k < count; k++) {
            store(to + ((row - y) * columns + column - x) * LANES, lane[k]);
            if (++column == from.width) column = 0, row++;
        }
    }
}

// the way back: `rows` x width numbers, lane by lane, to rows from y on of up to LANES planes
void gather(const Images& to, float* planes, int lanes, int64_t y, int64_t rows, const float* from) {
    const int64_t plane = to.height * to.width, begin = y * to.width, count = rows * to.width;
    for (int64_t p = 0; p < count; p += LANES) {
        const int width = int(least(LANES, count - p));
        V32 lane[LANES];
        for (int k = 0; k < LANES; k++) lane[k] = k < width ? load(from + (p + k) * LANES) : each(0.f);
        turn<float>(lane);
        for (int k = 0; k < lanes; k++) put(planes + k * plane + begin + p, lane[k], width);
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

// B^T d B of each tile of 4 x 4 numbers, two apart
void numbers_of(const float* d, int64_t columns, int64_t rows, int64_t wide, const Points& to, int64_t tile,
                int64_t lane) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < wide; j++, tile++) {
            V32 y[4][4];
            for (int b = 0; b < 4; b++) {
                const float* at = d + (2 * i * columns + 2 * j + b) * LANES;
                const V32 x0 = load(at), x1 = load(at + columns * LANES), x2 = load(at + 2 * columns * LANES),
                          x3 = load(at + 3 * columns * LANES);
                y[0][b] = x0 - x2, y[1][b] = x1 + x2, y[2][b] = x2 - x1, y[3][b] = x1 - x3;
            }
            for (int a = 0; a < 4; a++) {
                store(to.at(4 * a + 0, tile, lane), y[a][0] - y[a][2]);
                store(to.at(4 * a + 1, tile, lane), y[a][1] + y[a][2]);
                store(to.at(4 * a + 2, tile, lane), y[a][2] - y[a][1]);
                store(to.at(4 * a + 3, tile, lane), y[a][1] - y[a][3]);
            }
        }
}

// A y A^T of each tile of 2 x 2 numbers
void gradients_of(const float* d, int64_t columns, int64_t rows, int64_t wide, const Points& to, int64_t tile,
                  int64_t lane) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < wide; j++, tile++) {
            V32 y[4][2];
            for (int b = 0; b < 2; b++) {
                const float* at = d + (2 * i * columns + 2 * j + b) * LANES;
                const V32 x0 = load(at), x1 = load(at + columns * LANES);
                y[0][b] = x0, y[1][b] = x0 + x1, y[2][b] = x0 - x1, y[3][b] = -x1;
            }
            for (int a = 0; a < 4; a++) {
                store(to.at(4 * a + 0, tile, lane), y[a][0]);
                store(to.at(4 * a + 1, tile, lane), y[a][0] + y[a][1]);
                store(to.at(4 * a + 2, tile, lane), y[a][0] - y[a][1]);
                store(to.at(4 * a + 3, tile, lane), -y[a][1]);
            }
        }
}

// A^T m A of each tile, to rows of `width` numbers; what it adds to `check` is NaN if one of them is not finite
void results_of(const Points& from, int64_t tile, int64_t lane, int64_t rows, int64_t high, int64_t wide, int64_t width,
                float* to, V32& check) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < wide; j++, tile++) {
            V32 y[2][4];
            for (int b = 0; b < 4; b++) {
                const V32 m0 = load(from.at(b, tile, lane)), m1 = load(from.at(4 + b, tile, lane)),
                          m2 = load(from.at(8 + b, tile, lane)), m3 = load(from.at(12 + b, tile, lane));
                y[0][b] = m0 + m1 + m2, y[1][b] = m1 - m2 - m3;
            }
            for (int a = 0; a < 2 && 2 * i + a < high; a++) {
                float* at = to + ((2 * i + a) * width + 2 * j) * LANES;
                const V32 left = y[a][0] + y[a][1] + y[a][2], right = y[a][1] - y[a][2] - y[a][3];
                check = fma(left, each(0.f), fma(right, each(0.f), check));
                store(at, left);
                if (2 * j + 1 < width) store(at + LANES, right);
            }
        }
}

struct Taps {  // weights, as (lanes, rows, 9), whichever of them are the results' channels
    float* data;
    int64_t lane, row;
    bool rotated;
};

// G w G^T of up to LANES lanes and `rows` rows
void weights_of(const Taps& w, int64_t lane, int lanes, int64_t row, int64_t rows, float* to, int64_t size) {
    const V32 half = each(0.5f);
    for (int64_t r = 0; r < rows; r++) {
        const float* from = w.data + lane * w.lane + (row + r) * w.row;
        V32 tap[TAPS], x[LANES];
        for (int base = 0; base < TAPS; base += LANES) {
            const int count = LANES < TAPS - base ? LANES : TAPS - base;
            for (int k = 0; k < LANES; k++) x[k] = k < lanes ? some(from + k * w.lane + base, count) : each(0.f);
            turn<float>(x);
            for (int k = 0; k < count; k++) tap[w.rotated ? TAPS - 1 - base - k : base + k] = x[k];
        }
        V32 y[4][3];
        for (int b = 0; b < 3; b++) {
            const V32 ends = half * (tap[b] + tap[6 + b]), middle = half * tap[3 + b];
            y[0][b] = tap[b], y[1][b] = ends + middle, y[2][b] = ends - middle, y[3][b] = tap[6 + b];
        }
        for (int a = 0; a < 4; a++) {
            const V32 ends = half * (y[a][0] + y[a][2]), middle = half * y[a][1];
            float* at = to + 4 * a * size + r * PANEL;
            store(at, y[a][0]), store(at + size, ends + middle), store(at + 2 * size, ends - middle);
            store(at + 3 * size, y[a][2]);
        }
    }
}

// G^T s G of up to LANES lanes: 9 numbers each
void taps_of(const float* s, int64_t size, float* to, int lanes, V32& check) {
    const V32 half = each(0.5f);
    V32 y[3][4], tap[TAPS];
    for (int b = 0; b < 4; b++) {
        const V32 s0 = load(s + b * size), s1 = load(s + (4 + b) * size), s2 = load(s + (8 + b) * size),
                  s3 = load(s + (12 + b) * size);
        const V32 both = half * (s1 + s2);
        y[0][b] = s0 + both, y[1][b] = half * (s1 - s2), y[2][b] = both + s3;
    }
    for (int a = 0; a < 3; a++) {
        const V32 both = half * (y[a][1] + y[a][2]);
        tap[3 * a] = y[a][0] + both, tap[3 * a + 1] = half * (y[a][1] - y[a][2]), tap[3 * a + 2] = both + y[a][3];
    }
    for (int k = 0; k < TAPS; k++) check = fma(tap[k], each(0.f), check);
    for (int base = 0; base < TAPS; base += LANES) {
        const int count = LANES < TAPS - base ? LANES : TAPS - base;
        V32 x[LANES];
        for (int k = 0; k < LANES; k++) x[k] = k < count ? tap[base + k] : each(0.f);
        turn<float>(x);
        for (int k = 0; k < lanes; k++) put(to + k * TAPS + base, x[k], count);
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
                numbers_of(strip, columns, rows, tiles.wide, to, tile, lane);
            });
    }

    // of the channels [first, last)
    void gradients(const Images& grad, int64_t first, int64_t last, int64_t block, float* strip,
                   const Points& to) const {
        for (int64_t lane = first; lane < last; lane += LANES)
            segments(tiles, begin(block), end(block), [&](int64_t image, int64_t row, int64_t rows, int64_t tile) {
                spread(grad, grad.plane(image, lane), int(least(LANES, last - lane)), 2 * row, 2 * rows, 0, columns,
                       strip);
                gradients_of(strip, columns, rows, tiles.wide, to, tile, lane - first);
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
