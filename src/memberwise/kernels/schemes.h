// Schemes of a convolution of 3 taps along one dimension, by which it takes fewer products: what becomes of a tile's
// numbers, gradients and weights as points, and of the points' products as results, or, summed up, as the weights'
// gradient.

namespace {

constexpr int KINDS = 4;  // different points of the weights: some points may share one

// results one apart, F(2, 3): the matrices B^T, A, A^T, G and G^T
struct One {
    static constexpr int IN = 4, STEP = 2, POINTS = 4, OUT = 2;  // numbers of a tile, and from one to the next; results
    static constexpr int kind(int point) { return point; }

    static void of_numbers(const V32 (&x)[IN], V32 (&y)[POINTS]) {
        y[0] = x[0] - x[2], y[1] = x[1] + x[2], y[2] = x[2] - x[1], y[3] = x[1] - x[3];
    }
    static void of_gradients(const V32 (&x)[OUT], V32 (&y)[POINTS]) {
        y[0] = x[0], y[1] = x[0] + x[1], y[2] = x[0] - x[1], y[3] = -x[1];
    }
    static void of_results(const V32 (&x)[POINTS], V32 (&y)[OUT]) {
        y[0] = x[0] + x[1] + x[2], y[1] = x[1] - x[2] - x[3];
    }
    static void of_weights(const V32 (&x)[3], V32 (&y)[KINDS]) {
        const V32 ends = each(0.5f) * (x[0] + x[2]), middle = each(0.5f) * x[1];
        y[0] = x[0], y[1] = ends + middle, y[2] = ends - middle, y[3] = x[2];
    }
    static void of_sums(const V32 (&x)[KINDS], V32 (&y)[3]) {
        const V32 both = each(0.5f) * (x[1] + x[2]);
        y[0] = x[0] + both, y[1] = each(0.5f) * (x[1] - x[2]), y[2] = both + x[3];
    }

    // the numbers' gradient is a convolution of the results' with the weights rotated: what lies around these, and how
    // much of the first tile lies before the first number
    using Back = One;
    static int64_t around(int64_t padding) { return 2 - padding; }
    static int64_t before(int64_t) { return 0; }
};

struct TwoBack;

// results two apart: the outer taps meet even numbers alone, F(2, 2) in 3 products, the middle one odd numbers, in 2
struct Two {
    static constexpr int IN = 5, STEP = 4, POINTS = 5, OUT = 2;
    static constexpr int kind(int point) { return point < KINDS ? point : KINDS - 1; }

    static void of_numbers(const V32 (&x)[IN], V32 (&y)[POINTS]) {
        y[0] = x[0] - x[2], y[1] = x[2], y[2] = x[2] - x[4], y[3] = x[1], y[4] = x[3];
    }
    static void of_gradients(const V32 (&x)[OUT], V32 (&y)[POINTS]) {
        y[0] = x[0], y[1] = x[0] + x[1], y[2] = -x[1], y[3] = x[0], y[4] = x[1];
    }
    static void of_results(const V32 (&x)[POINTS], V32 (&y)[OUT]) {
        y[0] = x[0] + x[1] + x[3], y[1] = x[1] - x[2] + x[4];
    }
    static void of_weights(const V32 (&x)[3], V32 (&y)[KINDS]) {
        y[0] = x[0], y[1] = x[0] + x[2], y[2] = x[2], y[3] = x[1];
    }
    static void of_sums(const V32 (&x)[KINDS], V32 (&y)[3]) {
        y[0] = x[0] + x[1], y[1] = x[3], y[2] = x[1] + x[2];
    }

    using Back = TwoBack;
    static int64_t around(int64_t padding) { return (1 + before(padding) - padding) / 2; }
    static int64_t before(int64_t padding) { return 1 - padding % 2; }  // a tile begins where the middle tap is
};

// the way back of `Two`: 3 gradients give those of 4 numbers, odd and even in turn
struct TwoBack {
    static constexpr int IN = 3, STEP = 2, POINTS = 5, OUT = 4;
    static constexpr int kind(int point) { return Two::kind(point); }

    static void of_numbers(const V32 (&x)[IN], V32 (&y)[POINTS]) {
        y[0] = x[0] - x[1], y[1] = x[1], y[2] = x[1] - x[2], y[3] = x[0], y[4] = x[1];
    }
    static void of_results(const V32 (&x)[POINTS], V32 (&y)[OUT]) {
        y[0] = x[3], y[1] = x[0] + x[1], y[2] = x[4], y[3] = x[1] - x[2];
    }
    static void of_weights(const V32 (&x)[3], V32 (&y)[KINDS]) { Two::of_weights(x, y); }
};

}  // namespace
