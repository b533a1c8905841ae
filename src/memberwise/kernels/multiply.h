// One product of float32 matrices: tiles of the result stay in registers while their sum is taken
// (Goto, van de Geijn: Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008).

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, TALL = 14;
using V = __m512;
inline V each(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8, TALL = 6;
using V = __m256;
inline V each(float x) { return _mm256_set1_ps(x); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#error "for other processors torch's own products serve"
#endif

constexpr int WIDE = 2 * W;   // columns of a tile
constexpr int64_t DEEP = 256;    // rows of the right factor that a panel holds: with WIDE columns it fills the first cache

struct Strided {
    const float* data;
    int64_t row, column;
    const float* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// W x W elements, turned over: after log2(W) perfect shuffles of its rows
inline void turn(V (&x)[W]) {
    V y[W];
    for (int step = 1; step < W; step *= 2) {
        for (int k = 0; k < W / 2; k++) {
            y[2 * k] = __builtin_shufflevector(x[k], x[k + W / 2], LOW);
            y[2 * k + 1] = __builtin_shufflevector(x[k], x[k + W / 2], HIGH);
        }
        for (int k = 0; k < W; k++) x[k] = y[k];
    }
}

// deep x width elements of b, row after row, WIDE to a row; what is beyond the width is 0
void pack(Strided b, int64_t deep, int64_t width, float* to) {
    if (b.column == 1) {
        for (int64_t l = 0; l < deep; l++) {
            std::memcpy(to + l * WIDE, b.at(l, 0), width * sizeof(float));
            std::fill(to + l * WIDE + width, to + (l + 1) * WIDE, 0.f);
        }
        return;
    }
    int64_t turned = 0;
    if (b.row == 1 && width >= W) {
        turned = deep / W * W;
        for (int64_t j = 0; j + W <= width; j += W)
            for (int64_t l = 0; l < turned; l += W) {
                V x[W];
                for (int k = 0; k < W; k++) x[k] = load(b.at(l, j + k));
                turn(x);
                for (int k = 0; k < W; k++) store(to + (l + k) * WIDE + j, x[k]);
            }
    }
    const int64_t done = turned ? width / W * W : 0;
    for (int64_t l = 0; l < deep; l++) {
        for (int64_t j = l < turned ? done : 0; j < width; j++) to[l * WIDE + j] = *b.at(l, j);
        std::fill(to + l * WIDE + width, to + (l + 1) * WIDE, 0.f);
    }
}

// a tile of TALL rows or fewer and VECTORS * W columns: c = a b, or c += a b
template <int HEIGHT, int VECTORS>
inline void tile(Strided a, const float* b, int64_t pitch, int64_t deep, float* c, int64_t to, bool more) {
    V sum[HEIGHT][VECTORS];
    for (int i = 0; i < HEIGHT; i++)
        for (int v = 0; v < VECTORS; v++) sum[i][v] = more ? load(c + i * to + v * W) : each(0.f);
    for (int64_t l = 0; l < deep; l++) {
        V row[VECTORS];
        for (int v = 0; v < VECTORS; v++) row[v] = load(b + l * pitch + v * W);
#pragma GCC unroll 14
        for (int i = 0; i < HEIGHT; i++) {
            const V x = each(*a.at(i, l));
            for (int v = 0; v < VECTORS; v++) sum[i][v] = fma(x, row[v], sum[i][v]);
        }
    }
    for (int i = 0; i < HEIGHT; i++)
        for (int v = 0; v < VECTORS; v++) store(c + i * to + v * W, sum[i][v]);
}

using Tile = void (*)(Strided, const float*, int64_t, int64_t, float*, int64_t, bool);

template <int VECTORS, int HEIGHT = TALL>
Tile tile_of(int height) {
    if constexpr (HEIGHT == 1) return tile<1, VECTORS>;
    else return height == HEIGHT ? tile<HEIGHT, VECTORS> : tile_of<VECTORS, HEIGHT - 1>(height);
}

// c = a b, or c += a b: rows x n elements, whose rows are `to` apart
void multiply(Strided a, Strided b, float* c, int64_t to, int64_t rows, int64_t n, int64_t k, bool adds = false) {
    alignas(64) float panel[DEEP * WIDE], part[TALL * WIDE];
    const int64_t blocks = (rows + TALL - 1) / TALL;
    for (int64_t l = 0; l < k; l += DEEP) {
        const int64_t deep = std::min(DEEP, k - l);
        for (int64_t j = 0; j < n; j += WIDE) {
            const int64_t width = std::min<int64_t>(WIDE, n - j);
            const bool direct = b.column == 1 && width == WIDE;
            if (!direct) pack({b.at(l, j), b.row, b.column}, deep, width, panel);
            const float* right = direct ? b.at(l, j) : panel;
            const int64_t pitch = direct ? b.row : WIDE;
            for (int64_t block = 0, i = 0; block < blocks; block++) {
                const int height = (rows - i) / (blocks - block);
                const Tile run = width > W ? tile_of<2>(height) : tile_of<1>(height);
                float* own = c + i * to + j;
                const bool more = adds || l > 0;
                if (width == WIDE || width == W) {
                    run({a.at(i, l), a.row, a.column}, right, pitch, deep, own, to, more);
                } else {
                    for (int64_t r = 0; more && r < height; r++) std::copy(own + r * to, own + r * to + width, part + r * WIDE);
                    run({a.at(i, l), a.row, a.column}, right, pitch, deep, part, WIDE, more);
                    for (int64_t r = 0; r < height; r++) std::copy(part + r * WIDE, part + r * WIDE + width, own + r * to);
                }
                i += height;
            }
        }
    }
}

}  // namespace

#define CHECKED(call) if (const AOTITorchError error = call) return error
