// Products of matrices, one for each member.

#include <omp.h>

namespace {

constexpr int64_t ROWS = LAID, FEW = 8;  // of a task, at most; and at least, where rows are cut for cores to be even
constexpr double MANY = 1e5;   // multiplications from which on other cores are asked
constexpr int64_t NEAR = 1 << 20;  // bytes of all tasks that a core may have in its second cache, before and after
constexpr int64_t SOON = 1 << 19;  // bytes of a task that may come into it beside another's

struct Span {  // memory that is asked for, some lines at a time
    const char* at = nullptr;
    int64_t lines = 0, some = 0;
    Span() = default;
    Span(const void* from, int64_t bytes, int64_t times)
        : at(static_cast<const char*>(from)), lines(bytes / BYTES), some(parts_of(lines, times)) {}
    void ask() {
        for (int64_t i = 0; i < some && lines > 0; i++, lines--, at += BYTES) __builtin_prefetch(at, 0, 2);
    }
};

struct Ahead {  // what the next task reads and writes, asked for while this one multiplies
    Span left, right, out;
    void operator()() {
        left.ask();
        right.ask();
        out.ask();
    }
};

// of all members; c is dense, of a and b the strides are told; a bias of each column, or null, is bfloat16's alone
template <class T>
struct Products {
    T* c;
    const T *bias, *a, *b;
    int64_t members, m, n, k, apart;  // from one member's bias to the next's
    const int64_t *left, *right;
    int64_t parts = even(std::max<int64_t>(1, parts_of(m, ROWS))), tasks = members * parts;

    // of a single member, so that no core has a part more than another: of several it took as long, or longer
    int64_t even(int64_t parts) const {
        const int64_t cores = omp_get_max_threads();
        return members == 1 && parts % cores && m >= FEW * parts * cores ? parts * cores : parts;
    }

    struct Task {  // some rows of one member's product
        int64_t member, begin, end;
    };
    Task task(int64_t which) const {
        const int64_t part = which % parts;
        return {which / parts, m * part / parts, m * (part + 1) / parts};
    }
    Strided<T> rows(Task of) const { return {a + of.member * left[0] + of.begin * left[1], left[1], left[2]}; }
    Strided<T> other(Task of) const { return {b + of.member * right[0], right[1], right[2]}; }
    const T* added(Task of) const { return bias ? bias + of.member * apart : nullptr; }
    T* out(Task of) const { return c + (of.member * m + of.begin) * n; }

    // whether tasks wait for memory, and the next one's fits beside
    bool far() const {
        const int64_t rows = parts_of(m, parts), share = (rows * k + k * n + rows * n) * int64_t(sizeof(T));
        return share <= SOON && tasks * share > NEAR;
    }
    // a factor that all members share is there already, and so is what the task before it has read
    Ahead before(Task next, Task now) const {
        const int64_t rows = next.end - next.begin;
        const int64_t times = std::max<int64_t>(1, tiles_of<T>(now.end - now.begin, n, k));
        const bool own = next.member != now.member;
        return {Span(this->rows(next).data, left[0] ? rows * k * sizeof(T) : 0, times),
                Span(other(next).data, own && right[0] ? k * n * sizeof(T) : 0, times),
                Span(out(next), rows * n * sizeof(T), times)};
    }
    void run() const {
        const bool asks = far();
        if (k == 0) std::fill_n(c, members * m * n, T(0));
#pragma omp parallel for schedule(static) if (tasks > 1 && double(members) * m * n * k > MANY)
        for (int64_t which = 0; which < tasks; which++) {
            const Task now = task(which);
            const int64_t count = now.end - now.begin;
            if constexpr (sizeof(T) == 2) {  // by pairs, which is not known to gain by it
                multiply(rows(now), other(now), added(now), out(now), n, count, n, k);
            } else {
                const Ahead ahead = asks && which + 1 < tasks ? before(task(which + 1), now) : Ahead{};
                multiply(rows(now), other(now), out(now), n, count, n, k, false, ahead);
            }
        }
    }
};

}  // namespace

// `bytes` of a number: 2 (bfloat16), 4 or 8
extern "C" void memberwise_products(void* c, const void* bias, const void* a, const void* b, int bytes, int64_t members,
                                    int64_t m, int64_t n, int64_t k, int64_t apart, const int64_t* left,
                                    const int64_t* right) {
    const auto of = [&](auto* out) {
        using T = std::remove_pointer_t<decltype(out)>;
        const auto given = [](const void* x) { return static_cast<const T*>(x); };
        Products<T>{out, given(bias), given(a), given(b), members, m, n, k, apart, left, right}.run();
    };
    if (bytes == 2) of(static_cast<Half*>(c));
    else if (bytes == 4) of(static_cast<float*>(c));
    else of(static_cast<double*>(c));
}

// the same for Inductor's code: of (M, m, k) and (M, k, n), or of (m, k) and (k, n)
static AOTITorchError multiplied(const void* bias, int64_t apart, AtenTensorHandle a, AtenTensorHandle b,
                                 AtenTensorHandle* product) {
    int64_t dim, *as, *bs, *left, *right;
    int32_t dtype;
    void *x, *y, *z;
    CHECKED(aoti_torch_get_dim(a, &dim));
    CHECKED(aoti_torch_get_dtype(a, &dtype));
    CHECKED(aoti_torch_get_sizes(a, &as));
    CHECKED(aoti_torch_get_sizes(b, &bs));
    CHECKED(aoti_torch_get_strides(a, &left));
    CHECKED(aoti_torch_get_strides(b, &right));
    CHECKED(aoti_torch_get_data_ptr(a, &x));
    CHECKED(aoti_torch_get_data_ptr(b, &y));
    const bool many = dim == 3;
    const int64_t members = many ? as[0] : 1, m = as[dim - 2], k = as[dim - 1], n = bs[dim - 1];
    const int64_t sizes[3] = {members, m, n}, strides[3] = {m * n, n, 1};
    CHECKED(aoti_torch_empty_strided(dim, sizes + 3 - dim, strides + 3 - dim, dtype, aoti_torch_device_type_cpu(), 0,
                                     product));
    CHECKED(aoti_torch_get_data_ptr(*product, &z));
    const int64_t first[3] = {many ? left[0] : 0, left[dim - 2], left[dim - 1]};
    const int64_t second[3] = {many ? right[0] : 0, right[dim - 2], right[dim - 1]};
    const int bytes = aoti_torch_dtype_element_size(dtype);
    memberwise_products(z, bias, x, y, bytes, members, m, n, k, apart, first, second);
    return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError aoti_torch_cpu_product(AtenTensorHandle a, AtenTensorHandle b, AtenTensorHandle* product) {
    return multiplied(nullptr, 0, a, b, product);
}

// plus a bias of (M, 1, n), which may be one for all, or of (n)
extern "C" AOTITorchError aoti_torch_cpu_product_plus(AtenTensorHandle bias, AtenTensorHandle a, AtenTensorHandle b,
                                                      AtenTensorHandle* product) {
    int64_t dim, *sizes, *strides;
    void* x;
    CHECKED(aoti_torch_get_dim(bias, &dim));
    CHECKED(aoti_torch_get_sizes(bias, &sizes));
    CHECKED(aoti_torch_get_strides(bias, &strides));
    CHECKED(aoti_torch_get_data_ptr(bias, &x));
    return multiplied(x, dim == 3 && sizes[0] > 1 ? strides[0] : 0, a, b, product);
}
