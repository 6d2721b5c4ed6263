// Put in front of every source: wide vectors, unaligned access, exp, log, tanh, erf.
//
// These kernels are for CPU-type devices: one work-item is one work-group and works on vectors of LANES floats that it
// spells out itself. Build constant: LANES, 8 or 16, the width of the device's float registers.
//
// Arguments: TENSOR(x) declares two parameters, the buffer and the offset of the view's first element; BASE(x) is the
// pointer to that element. Strides and offsets count elements.
//
// Arithmetic is written without library builtins, fma or vload/vstore: with PoCL 3.0 from PyPI they are calls, several
// times slower than the operators, and the compiler contracts a * b + c by itself.
// Clamps are written so that NaN passes: a comparison with NaN is false and must leave the value as it is.

#pragma OPENCL FP_CONTRACT ON

#ifndef LANES
#define LANES 8
#endif
#if LANES == 16
typedef float16 vec;
typedef int16 ivec;
#define LANE_INDEX ((ivec)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
#define as_vec as_float16
#define as_ivec as_int16
#else
typedef float8 vec;
typedef int8 ivec;
#define LANE_INDEX ((ivec)(0, 1, 2, 3, 4, 5, 6, 7))
#define as_vec as_float8
#define as_ivec as_int8
#endif
typedef float vec_unaligned __attribute__((ext_vector_type(LANES), aligned(4)));

#define KERNEL __kernel __attribute__((reqd_work_group_size(1, 1, 1))) void
#define TENSOR(x) __global const float *x##_buffer, const int x##_offset
#define TENSOR_OUT(x) __global float *x##_buffer, const int x##_offset
#define TENSOR_INT64(x) __global const long *x##_buffer, const int x##_offset
#define BASE(x) (x##_buffer + x##_offset)

// Vectors from and to any multiple of 4 bytes, in global, local or private memory.
#define LOAD(p) ((vec)(*(__global const vec_unaligned *)(p)))
#define STORE(p, v) (*(__global vec_unaligned *)(p) = (vec_unaligned)(v))
#define LOAD_LOCAL(p) ((vec)(*(__local const vec_unaligned *)(p)))
#define STORE_LOCAL(p, v) (*(__local vec_unaligned *)(p) = (vec_unaligned)(v))

// The first n < LANES elements; the other lanes are `fill`.
static inline vec load_first(__global const float *p, int n, float fill)
{
    union { vec v; float f[LANES]; } u;
    u.v = (vec)(fill);
    for (int i = 0; i < n; i++) u.f[i] = p[i];
    return u.v;
}

static inline void store_first(__global float *p, vec v, int n)
{
    union { vec v; float f[LANES]; } u;
    u.v = v;
    for (int i = 0; i < n; i++) p[i] = u.f[i];
}

// LANES elements of a row, `stride` apart, of which n are left; the others are `fill`. `end` is where the tensor's memory
// ends: before it a whole vector is read even if the row is shorter, which is several times faster than n floats.
static inline vec load_row(__global const float *p, __global const float *end, int stride, int n, float fill)
{
    if (stride == 1 && n >= LANES) return LOAD(p);
    if (stride == 1 && p + LANES <= end) return LANE_INDEX < n ? LOAD(p) : (vec)(fill);
    union { vec v; float f[LANES]; } u;
    u.v = (vec)(fill);
    for (int i = 0; i < LANES && i < n; i++) u.f[i] = p[(size_t)i * stride];
    return u.v;
}

static inline void store_row(__global float *p, int stride, int n, vec v)
{
    if (stride == 1 && n >= LANES) {
        STORE(p, v);
        return;
    }
    union { vec v; float f[LANES]; } u;
    u.v = v;
    for (int i = 0; i < LANES && i < n; i++) p[(size_t)i * stride] = u.f[i];
}

// The rows of a group: rows_per_group of them, fewer in the last.
#define FOR_ROWS(r, n_rows, rows_per_group) \
    for (int r = get_group_id(0) * (rows_per_group); r < (n_rows) && r < (int)(get_group_id(0) + 1) * (rows_per_group); r++)

// LANES elements of a row of D, from column c on; x is where the row begins. PLAIN: 1 if the stride x_col of all operands
// is 1, 2 if D is a multiple of LANES besides. Without code for other strides and for the end of a row, loops are twice as
// fast.
#if PLAIN
#define COL(stride) 1
#else
#define COL(stride) (stride)
#endif
#if PLAIN == 2
#define GET_ROW(x, fill) LOAD((x) + c)
#define PUT_ROW(x, v) STORE((x) + c, v)
#else
#define GET_ROW(x, fill) load_row(x + (size_t)c * COL(x##_col), x##_end, COL(x##_col), D - c, fill)
#define PUT_ROW(x, v) store_row(x + (size_t)c * COL(x##_col), COL(x##_col), D - c, v)
#endif

// The columns c of a row of D, LANES at a time; u goes round through 0 .. 3. A sum over a row is kept in four parts: an
// addition takes as long as four of them begin.
#define FOR_COLUMNS(c, u) \
    for (int c##_0 = 0; c##_0 < D; c##_0 += 4 * LANES) \
        _Pragma("unroll") for (int u = 0, c = c##_0; u < 4; u++, c += LANES) \
            if (c < D)

// Horizontal reductions, always in the same order: halves on halves.
static inline float sum_lanes(vec v)
{
#if LANES == 16
    float8 w = v.lo + v.hi;
#else
    float8 w = v;
#endif
    float4 x = w.lo + w.hi;
    float2 y = x.lo + x.hi;
    return y.x + y.y;
}

static inline float sum_parts(vec *parts)
{
    return sum_lanes((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// Interleave the lower (upper) halves of a and b: a0 b0 a1 b1 ...
// NO_SHUFFLES: element by element, for checkers that don't follow values through shuffles.
#ifdef NO_SHUFFLES
static inline vec interleave(vec a, vec b, int first)
{
    union { vec v; float f[LANES]; } x, y, z;
    x.v = a, y.v = b;
    for (int i = 0; i < LANES / 2; i++) z.f[2 * i] = x.f[first + i], z.f[2 * i + 1] = y.f[first + i];
    return z.v;
}
#define INTERLEAVE_LOW(a, b) interleave(a, b, 0)
#define INTERLEAVE_HIGH(a, b) interleave(a, b, LANES / 2)
#elif LANES == 16
#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#endif
#define LOG2_LANES (LANES == 16 ? 4 : 3)

// Transpose LANES x LANES floats in registers: log2(LANES) rounds that interleave row i with row i + LANES / 2.
static inline void transpose(vec *rows)
{
    #pragma unroll
    for (int round = 0; round < LOG2_LANES; round++) {
        vec next[LANES];
        #pragma unroll
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = INTERLEAVE_LOW(rows[i], rows[i + LANES / 2]);
            next[2 * i + 1] = INTERLEAVE_HIGH(rows[i], rows[i + LANES / 2]);
        }
        #pragma unroll
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

// The larger one; NaN if either is, as torch.maximum.
static inline vec __attribute__((overloadable)) maximum(vec a, vec b) { return ((a > b) | (a != a)) ? a : b; }
static inline float __attribute__((overloadable)) maximum(float a, float b) { return a > b || a != a ? a : b; }
static inline vec __attribute__((overloadable)) minimum(vec a, vec b) { return ((a < b) | (a != a)) ? a : b; }
static inline float __attribute__((overloadable)) minimum(float a, float b) { return a < b || a != a ? a : b; }

// The larger one, NaN if b is: enough, and faster, where a NaN shows anyway in what is computed next.
static inline vec __attribute__((overloadable)) larger(vec a, vec b) { return a > b ? a : b; }
static inline float __attribute__((overloadable)) larger(float a, float b) { return a > b ? a : b; }

static inline float larger_lanes(vec v)
{
#if LANES == 16
    float8 w = v.lo > v.hi ? v.lo : v.hi;
#else
    float8 w = v;
#endif
    float4 x = w.lo > w.hi ? w.lo : w.hi;
    float2 y = x.lo > x.hi ? x.lo : x.hi;
    return larger(y.x, y.y);
}

static inline float max_lanes(vec v)
{
    union { vec v; float f[LANES]; } u;
    u.v = v;
    float m = u.f[0];
    for (int i = 1; i < LANES; i++) m = maximum(m, u.f[i]);
    return m;
}

static inline float min_lanes(vec v)
{
    return -max_lanes(-v);
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; the polynomial and the split of ln 2 are Cephes' expf.
// Rounding: adding 1.5 * 2^23 leaves no room for a fraction. 2^n is applied in two halves, so that n = 128 is legal.
// Within 2 ulp; results below FLT_MIN are 0 (denormals would cost 100 times as much); NaN -> NaN, inf -> inf.
static inline vec exp_rest(vec y, vec n)  // exp(r) for x = y
{
    vec r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r + 1.0f;
}
static inline vec __attribute__((overloadable)) exp_(vec x)
{
    vec y = x < -87.336f ? (vec)(-87.336f) : x;
    y = y > 89.0f ? (vec)(89.0f) : y;
    vec n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec p = exp_rest(y, n);
    ivec i = __builtin_convertvector(n, ivec);
    ivec half_i = i >> 1;
    vec result = p * as_vec((half_i + 127) << 23) * as_vec((i - half_i + 127) << 23);
    return x < -87.336f ? (vec)(0.0f) : result;
}
static inline float __attribute__((overloadable)) exp_(float x) { return exp_((vec)(x)).s0; }

// The same for x <= 0 (in fact x < 88), in three quarters of the operations: -126 <= n <= 127 needs no halves.
static inline vec exp_nonpositive(vec x)
{
    vec y = x < -87.336f ? (vec)(-87.336f) : x;
    vec n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec result = exp_rest(y, n) * as_vec((__builtin_convertvector(n, ivec) + 127) << 23);
    return x < -87.336f ? (vec)(0.0f) : result;
}

// log(x), Cephes' logf: x = m * 2^e with m in [sqrt(1/2), sqrt(2)). Within 2 ulp.
// 0 -> -inf, negative -> NaN, inf -> inf, NaN -> NaN; denormals are scaled up first.
static inline vec __attribute__((overloadable)) log_(vec x)
{
    ivec tiny = x < 1.17549435e-38f;
    vec y = tiny ? x * 33554432.0f : x;
    ivec bits = as_ivec(y);
    vec e = __builtin_convertvector((bits >> 23) - 126, vec) - (tiny ? (vec)(25.0f) : (vec)(0.0f));
    vec m = as_vec((bits & 0x007fffff) | 0x3f000000);
    ivec low = m < 0.707106781f;
    e = low ? e - 1.0f : e;
    m = low ? m + m - 1.0f : m - 1.0f;
    vec z = m * m;
    vec p = 7.0376836292e-2f * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z - 2.12194440e-4f * e - 0.5f * z;
    vec result = m + p + 0.693359375f * e;
    result = x == 0.0f ? (vec)(-INFINITY) : result;
    result = x < 0.0f ? (vec)(NAN) : result;
    return ((x == INFINITY) | (x != x)) ? x : result;
}
static inline float __attribute__((overloadable)) log_(float x) { return log_((vec)(x)).s0; }

// tanh(x): Cephes' tanhf, a polynomial below 0.625, 1 - 2 / (exp(2 x) + 1) above. Within 3 ulp.
static inline vec __attribute__((overloadable)) tanh_(vec x)
{
    vec z = x * x;
    vec p = -5.70498872745e-3f * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    vec small = p * z * x + x;
    vec large = 1.0f - 2.0f / (exp_(2.0f * x) + 1.0f);
    return z < 0.390625f ? small : large;
}
static inline float __attribute__((overloadable)) tanh_(float x) { return tanh_((vec)(x)).s0; }

// erf(x) as x P(x^2) / Q(x^2) on [-4, 4], where 1 - erf(4) < 2e-8; the coefficients are Eigen's (generic_fast_erf_float).
// Absolute error below 5e-7.
static inline vec __attribute__((overloadable)) erf_(vec x)
{
    vec y = x > 4.0f ? (vec)(4.0f) : x;
    y = y < -4.0f ? (vec)(-4.0f) : y;
    vec z = y * y;
    vec p = -2.72614225801306e-10f * z + 2.77068142495902e-08f;
    p = p * z - 2.10102402082508e-06f;
    p = p * z - 5.69250639462346e-05f;
    p = p * z - 7.34990630326855e-04f;
    p = p * z - 2.95459980854025e-03f;
    p = p * z - 1.60960333262415e-02f;
    vec q = -1.45660718464996e-05f * z - 2.13374055278905e-04f;
    q = q * z - 1.68282697438203e-03f;
    q = q * z - 7.37332916720468e-03f;
    q = q * z - 1.42647390514189e-02f;
    return y * p / q;
}
static inline float __attribute__((overloadable)) erf_(float x) { return erf_((vec)(x)).s0; }

// sqrt lane by lane: the operator exists in hardware, with PoCL the library's function is a call. Other compilers may not
// know clang's builtin.
#ifdef HAS_BUILTIN_SQRT
#define SQRT __builtin_sqrtf
#else
#define SQRT sqrt
#endif

// A line of memory that will be read soon; the library's function is nothing with PoCL.
#ifdef HAS_BUILTIN_SQRT
#define PREFETCH __builtin_prefetch
#else
#define PREFETCH(p)
#endif
static inline float __attribute__((overloadable)) sqrt_(float x) { return SQRT(x); }
static inline vec __attribute__((overloadable)) sqrt_(vec x)
{
    union { vec v; float f[LANES]; } u;
    u.v = x;
    for (int i = 0; i < LANES; i++) u.f[i] = SQRT(u.f[i]);
    return u.v;
}
