// One product of matrices: tiles of the result stay in registers while their sum is taken
// (Goto, van de Geijn: Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008).

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <type_traits>

namespace {

// a vector register: W numbers
#if defined(__AVX512F__)
#define SIMD(name) _mm512_##name
constexpr int TALL = 14;  // rows of a tile: with two vectors of columns it fills the registers
using V32 = __m512;
using V64 = __m512d;
#elif defined(__AVX2__) && defined(__FMA__)
#define SIMD(name) _mm256_##name
constexpr int TALL = 6;
using V32 = __m256;
using V64 = __m256d;
#else
#error "for other processors torch's own kernels serve"
#endif

inline V32 each(float x) { return SIMD(set1_ps)(x); }
inline V64 each(double x) { return SIMD(set1_pd)(x); }
inline V32 load(const float* p) { return SIMD(loadu_ps)(p); }
inline V64 load(const double* p) { return SIMD(loadu_pd)(p); }
inline void store(float* p, V32 x) { SIMD(storeu_ps)(p, x); }
inline void store(double* p, V64 x) { SIMD(storeu_pd)(p, x); }
inline V32 fma(V32 a, V32 b, V32 c) { return SIMD(fmadd_ps)(a, b, c); }
inline V64 fma(V64 a, V64 b, V64 c) { return SIMD(fmadd_pd)(a, b, c); }

template <class T> using Vector = std::conditional_t<sizeof(T) == 4, V32, V64>;
template <class T> constexpr int W = sizeof(Vector<T>) / sizeof(T);
template <class T> constexpr int WIDE = 2 * W<T>;  // columns of a tile
constexpr int64_t DEEP = 256;  // rows of the right factor in a panel: with WIDE columns it stays in the first cache
constexpr int64_t LAID = 192;  // rows of a left factor that is laid anew, at most: with DEEP columns, in the second
constexpr int64_t BYTES = 64;  // of a line of the caches
constexpr int64_t FAR = 1 << 18, WRITTEN = 1 << 16;  // bytes of the right factor, and of the result, to be asked for

template <class T>
struct Strided {
    const T* data;
    int64_t row, column;
    const T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
    Strided from(int64_t i, int64_t j) const { return {at(i, j), row, column}; }
    Strided turned() const { return {data, column, row}; }
};

// the lower and the higher halves of two vectors, number by number in turn
template <int WIDTH, class V>
inline void zip(V a, V b, V& low, V& high) {
    if constexpr (WIDTH == 16) {
        low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    } else if constexpr (WIDTH == 8) {
        low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
        high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    } else {
        low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    }
}

// W x W numbers, turned over: after log2(W) perfect shuffles of its rows
template <class T>
inline void turn(Vector<T> (&x)[W<T>]) {
    constexpr int SIZE = W<T>;
    Vector<T> y[SIZE];
    for (int step = 1; step < SIZE; step *= 2) {
        for (int k = 0; k < SIZE / 2; k++) zip<SIZE>(x[k], x[k + SIZE / 2], y[2 * k], y[2 * k + 1]);
        for (int k = 0; k < SIZE; k++) x[k] = y[k];
    }
}

#if !defined(__AVX512F__)
// in half as many instructions, for here none shuffles across the halves of two vectors: first within them
template <>
inline void turn<float>(V32 (&x)[8]) {
    V32 pairs[8], fours[8];
    for (int k = 0; k < 8; k += 2) {
        pairs[k] = _mm256_unpacklo_ps(x[k], x[k + 1]);
        pairs[k + 1] = _mm256_unpackhi_ps(x[k], x[k + 1]);
    }
    for (int k = 0; k < 8; k += 4)
        for (int odd = 0; odd < 2; odd++) {
            fours[k + 2 * odd] = _mm256_shuffle_ps(pairs[k + odd], pairs[k + 2 + odd], 0x44);
            fours[k + 2 * odd + 1] = _mm256_shuffle_ps(pairs[k + odd], pairs[k + 2 + odd], 0xee);
        }
    for (int k = 0; k < 4; k++) {
        x[k] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x20);
        x[k + 4] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x31);
    }
}
#endif

// deep x width numbers of b, row after row, WIDE to a row; what is beyond the width is 0
template <class T>
void pack(Strided<T> b, int64_t deep, int64_t width, T* to) {
    constexpr int SIZE = W<T>, ROW = WIDE<T>;
    if (b.column == 1) {
        for (int64_t l = 0; l < deep; l++) {
            std::memcpy(to + l * ROW, b.at(l, 0), width * sizeof(T));
            std::fill(to + l * ROW + width, to + (l + 1) * ROW, T(0));
        }
        return;
    }
    const int64_t turned = b.row == 1 && width >= SIZE ? deep / SIZE * SIZE : 0;
    const int64_t done = turned ? width / SIZE * SIZE : 0;
    for (int64_t j = 0; j < done; j += SIZE)
        for (int64_t l = 0; l < turned; l += SIZE) {
            Vector<T> x[SIZE];
            for (int k = 0; k < SIZE; k++) x[k] = load(b.at(l, j + k));
            turn<T>(x);
            for (int k = 0; k < SIZE; k++) store(to + (l + k) * ROW + j, x[k]);
        }
    for (int64_t l = 0; l < deep; l++) {
        for (int64_t j = l < turned ? done : 0; j < width; j++) to[l * ROW + j] = *b.at(l, j);
        std::fill(to + l * ROW + width, to + (l + 1) * ROW, T(0));
    }
}

// a tile of TALL rows or fewer and VECTORS * W columns: c = a b, or c += a b
template <class T, int HEIGHT, int VECTORS>
inline void tile(Strided<T> a, const T* b, int64_t pitch, int64_t deep, T* c, int64_t to, bool more) {
    constexpr int SIZE = W<T>;
    Vector<T> sum[HEIGHT][VECTORS];  // in registers if all loops over it are unrolled: else they pass by the stack
#pragma GCC unroll 14
    for (int i = 0; i < HEIGHT; i++)
        for (int v = 0; v < VECTORS; v++) sum[i][v] = more ? load(c + i * to + v * SIZE) : each(T(0));
    for (int64_t l = 0; l < deep; l++) {
        Vector<T> row[VECTORS];
        for (int v = 0; v < VECTORS; v++) row[v] = load(b + l * pitch + v * SIZE);
#pragma GCC unroll 14
        for (int i = 0; i < HEIGHT; i++) {
            const Vector<T> x = each(*a.at(i, l));
            for (int v = 0; v < VECTORS; v++) sum[i][v] = fma(x, row[v], sum[i][v]);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < HEIGHT; i++)
        for (int v = 0; v < VECTORS; v++) store(c + i * to + v * SIZE, sum[i][v]);
}

template <class T> using Tile = void (*)(Strided<T>, const T*, int64_t, int64_t, T*, int64_t, bool);

// what `of` makes of a height that is known while compiling
template <int HEIGHT = TALL, class Of>
auto by_height(int64_t height, Of of) {
    if constexpr (HEIGHT > 1)
        if (height != HEIGHT) return by_height<HEIGHT - 1>(height, of);
    return of(std::integral_constant<int, HEIGHT>());
}

template <class T>
Tile<T> tile_of(int64_t height, int64_t width) {
    return by_height(height, [&](auto known) -> Tile<T> {
        constexpr int HEIGHT = decltype(known)::value;
        return width > W<T> ? tile<T, HEIGHT, 2> : tile<T, HEIGHT, 1>;
    });
}

// height rows of a and deep columns, column after column
template <class T>
void lay(Strided<T> a, int64_t height, int64_t deep, T* to) {
    by_height(height, [&](auto known) {
        constexpr int HEIGHT = decltype(known)::value;
        for (int64_t l = 0; l < deep; l++) std::memcpy(to + l * HEIGHT, a.at(0, l), HEIGHT * sizeof(T));
    });
}

inline int64_t parts_of(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

template <class T>
int64_t tiles_of(int64_t rows, int64_t n, int64_t k) {
    return parts_of(k, DEEP) * parts_of(n, WIDE<T>) * parts_of(rows, TALL);
}

struct Heights {  // of blocks of rows, a tile each: the first `low` of `height` rows, the others of one more
    int64_t count, height, low;
    explicit Heights(int64_t rows) : count(parts_of(rows, TALL)), height(rows / count), low(count - rows % count) {}
    bool tall(int64_t which) const { return which >= low; }
    int64_t first(int64_t which) const { return which * height + std::max<int64_t>(0, which - low); }
};

inline void ask(const char* at, int64_t bytes) {
    for (int64_t x = 0; x < bytes; x += BYTES) __builtin_prefetch(at + x, 0, 2);
}

// of one product, what is asked for while a tile is multiplied: some of the right factor's next panel, and the rows of
// the result that the next tile writes
template <class T>
struct Own {
    Strided<T> b;
    T* c;
    int64_t to, rows, n, k, blocks;
    bool right = k * n * int64_t(sizeof(T)) > FAR && (b.row == 1 || b.column == 1);
    bool out = rows * n * int64_t(sizeof(T)) > WRITTEN, asks = right || out;
    const char* at = nullptr;
    int64_t pieces = 0, pitch = 0, bytes = 0, times = 0;  // of the next panel: its rows, or its columns

    void panel(int64_t l, int64_t j) {
        if (j + WIDE<T> < n) j += WIDE<T>;
        else l += DEEP, j = 0;
        times = blocks;
        const int64_t deep = std::min(DEEP, k - l), width = std::min<int64_t>(WIDE<T>, n - j);
        pieces = right && deep > 0 ? b.column == 1 ? deep : width : 0;
        bytes = (b.column == 1 ? width : deep) * sizeof(T);
        pitch = (b.column == 1 ? b.row : b.column) * sizeof(T);
        at = reinterpret_cast<const char*>(b.at(l, j));
    }
    void tile(int64_t i, int64_t j) {
        for (int64_t left = parts_of(pieces, times); left > 0; left--, at += pitch) ask(at, bytes), pieces--;
        times--;
        for (int64_t r = i; out && r < std::min(i + TALL, rows); r++)
            ask(reinterpret_cast<const char*>(c + r * to + j), std::min<int64_t>(WIDE<T>, n - j) * sizeof(T));
    }
};

// whether a panel of it is read as it lies: its rows lie side by side, and do not share a few sets of the second cache
template <class T>
bool is_direct(Strided<T> b, int64_t rows) {
    return b.column == 1 && (b.row * int64_t(sizeof(T)) % 4096 || rows < 4 * TALL);
}

struct Nothing {
    void operator()() const {}
};

// as `multiply`, below; the left factor is read as it lies, or laid anew
template <class T, bool LAYS, class Then>
void multiply_rows(Strided<T> a, Strided<T> b, T* c, int64_t to, int64_t rows, int64_t n, int64_t k, bool adds,
                   Then& then) {
    constexpr int SIZE = W<T>, ROW = WIDE<T>;
    alignas(64) T panel[DEEP * ROW], part[TALL * ROW], laid[LAYS ? LAID * DEEP : 1];
    const Heights blocks(rows);
    Own<T> own{b, c, to, rows, n, k, blocks.count};
    for (int64_t l = 0; l < k; l += DEEP) {
        const int64_t deep = std::min(DEEP, k - l);
        const bool more = adds || l > 0;
        for (int64_t block = 0; LAYS && block < blocks.count; block++) {
            const int64_t i = blocks.first(block);
            lay(a.from(i, l), blocks.height + blocks.tall(block), deep, laid + i * deep);
        }
        for (int64_t j = 0; j < n; j += ROW) {
            const int64_t width = std::min<int64_t>(ROW, n - j);
            const bool whole = width == ROW || width == SIZE, direct = width == ROW && is_direct(b, rows);
            if (!direct) pack(b.from(l, j), deep, width, panel);
            const T* right = direct ? b.at(l, j) : panel;
            const int64_t pitch = direct ? b.row : ROW;
            const Tile<T> runs[2] = {tile_of<T>(blocks.height, width), tile_of<T>(blocks.height + 1, width)};
            if (own.asks) own.panel(l, j);
            for (int64_t block = 0; block < blocks.count; block++) {
                const bool tall = blocks.tall(block);
                const int64_t i = blocks.first(block), height = blocks.height + tall;
                if (own.asks) own.tile(i + height, j);
                const Strided<T> left = LAYS ? Strided<T>{laid + i * deep, 1, height} : a.from(i, l);
                T *place = c + i * to + j, *at = whole ? place : part;
                for (int64_t r = 0; !whole && more && r < height; r++) std::copy_n(place + r * to, width, at + r * ROW);
                runs[tall](left, right, pitch, deep, at, whole ? to : ROW, more);
                for (int64_t r = 0; !whole && r < height; r++) std::copy_n(at + r * ROW, width, place + r * to);
                then();
            }
        }
    }
}

// whether a tile's rows of the left factor come out of a line of each column, and these lines put each other out of the
// first cache, for they share its sets; and enough is multiplied by them to lay them anew
template <class T>
bool pays_laying(Strided<T> a, int64_t rows, int64_t n, int64_t k) {
    const int64_t apart = a.column * int64_t(sizeof(T));
    return a.row == 1 && apart >= 1024 && apart % 512 == 0 && rows > TALL && rows <= LAID && n >= 128 && k >= 128;
}

// c = a b, or c += a b: rows x n numbers, whose rows are `to` apart; `then` is called after each tile
template <class T, class Then = Nothing>
void multiply(Strided<T> a, Strided<T> b, T* c, int64_t to, int64_t rows, int64_t n, int64_t k, bool adds = false,
              Then then = {}) {
    if (rows == 0) return;
    if (pays_laying(a, rows, n, k)) multiply_rows<T, true>(a, b, c, to, rows, n, k, adds, then);
    else multiply_rows<T, false>(a, b, c, to, rows, n, k, adds, then);
}

}  // namespace

#define CHECKED(call) if (const AOTITorchError error = call) return error
