// Products of matrices, one for each member.

namespace {

constexpr int64_t ROWS = 192;  // of a task, at most
constexpr double MANY = 1e5;   // multiplications from which on other cores are asked

// c is dense; of a and b the strides are told
template <class T>
void products(T* c, const T* a, const T* b, int64_t members, int64_t m, int64_t n, int64_t k, const int64_t* left,
              const int64_t* right) {
    const int64_t parts = std::max<int64_t>(1, (m + ROWS - 1) / ROWS), tasks = members * parts;
    if (k == 0) std::fill_n(c, members * m * n, T(0));
#pragma omp parallel for schedule(static) if (tasks > 1 && double(members) * m * n * k > MANY)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t member = task / parts, part = task % parts;
        const int64_t begin = m * part / parts, end = m * (part + 1) / parts;
        const Strided<T> own{a + member * left[0] + begin * left[1], left[1], left[2]};
        const Strided<T> other{b + member * right[0], right[1], right[2]};
        multiply(own, other, c + (member * m + begin) * n, n, end - begin, n, k);
    }
}

}  // namespace

// `bytes` of a number: 2 (bfloat16), 4 or 8
extern "C" void memberwise_products(void* c, const void* a, const void* b, int bytes, int64_t members, int64_t m,
                                    int64_t n, int64_t k, const int64_t* left, const int64_t* right) {
    const auto of = [&](auto* out) {
        using T = std::remove_pointer_t<decltype(out)>;
        products<T>(out, static_cast<const T*>(a), static_cast<const T*>(b), members, m, n, k, left, right);
    };
    if (bytes == 2) of(static_cast<Half*>(c));
    else if (bytes == 4) of(static_cast<float*>(c));
    else of(static_cast<double*>(c));
}

// the same for Inductor's code: of (M, m, k) and (M, k, n), or of (m, k) and (k, n)
extern "C" AOTITorchError aoti_torch_cpu_product(AtenTensorHandle a, AtenTensorHandle b, AtenTensorHandle* product) {
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
    memberwise_products(z, x, y, aoti_torch_dtype_element_size(dtype), members, m, n, k, first, second);
    return AOTI_TORCH_SUCCESS;
}
