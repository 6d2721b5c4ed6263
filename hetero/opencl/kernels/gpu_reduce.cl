// Sum, maximum or minimum over some dimensions, on GPU-type devices.
//
//   out[chunk, kept] = scale * reduce of x[kept, reduced] over chunk `chunk` of the reduced elements
//
//   Kept and reduced elements are counted through in row-major order of KEPT and REDUCED dimensions with sizes ..._n0, ...
//   and strides ..._s0, ..., outermost first. out is contiguous; with several chunks it is a scratch of partial results,
//   which a second launch reduces.
//
// Work-group: GROUP_X x GROUP_Y work-items. ALONG_X: GROUP_X work-items reduce an element of out together, GROUP_Y elements
// a group; (ceil(kept / GROUP_Y), chunks) groups. Else GROUP_Y of them, and neighbours do neighbouring elements of out;
// (ceil(kept / GROUP_X), chunks) groups. Python takes the one whose work-items read what lies side by side.
// Build constants: KIND: 0 sum, 1 maximum, 2 minimum; ALONG_X; KEPT, REDUCED: up to 4 dimensions each.
// Maximum and minimum give NaN if one element is NaN, as torch. The order depends on the shape alone (and on sub-groups).
// Tolerance: n eps of the sum of |x| at worst; maximum and minimum are exact.
// Source: the definition.

#if KIND == 0
#define START 0.0f
#define COMBINE(a, b) ((a) + (b))
#elif KIND == 1
#define START (-INFINITY)
#define COMBINE(a, b) maximum(a, b)
#else
#define START INFINITY
#define COMBINE(a, b) minimum(a, b)
#endif
TREE(maximum_over_x, maximum, GROUP_X, X, 1)
TREE(maximum_over_y, maximum, GROUP_Y, Y, GROUP_X)
TREE(minimum_over_x, minimum, GROUP_X, X, 1)
TREE(minimum_over_y, minimum, GROUP_Y, Y, GROUP_X)
#if ALONG_X
#define OWN X
#define STEP GROUP_X
#define ACROSS(v, memory) (KIND == 0 ? sum_over_x(v, memory) : KIND == 1 ? maximum_over_x(v, memory) : minimum_over_x(v, memory))
#else
#define OWN Y
#define STEP GROUP_Y
#define ACROSS(v, memory) (KIND == 0 ? sum_over_y(v, memory) : KIND == 1 ? maximum_over_y(v, memory) : minimum_over_y(v, memory))
#endif

#define LAYOUT(x)                                                                                       \
    const int x##_n0, const int x##_n1, const int x##_n2, const int x##_n3, const int x##_s0, const int x##_s1, \
        const int x##_s2, const int x##_s3
// The place of the i-th element; with one dimension there is nothing to divide.
#define PLACE(x, dims, i) place(dims, i, x##_n1, x##_n2, x##_n3, x##_s0, x##_s1, x##_s2, x##_s3)
INLINE size_t place(const int dims, int i, const int n1, const int n2, const int n3, const int s0, const int s1,
                           const int s2, const int s3)
{
    size_t result = 0;
    if (dims > 3) result += (size_t)(i % n3) * s3, i /= n3;
    if (dims > 2) result += (size_t)(i % n2) * s2, i /= n2;
    if (dims > 1) result += (size_t)(i % n1) * s1, i /= n1;
    return result + (size_t)i * s0;
}

KERNEL reduce(TENSOR(x), TENSOR_OUT(out), const int kept, const int reduced, const int chunk_size, LAYOUT(kept),
              LAYOUT(reduced), const float scale)
{
    __local float memory[GROUP_ITEMS];
    const int chunk = get_group_id(1);
    const int i = ALONG_X ? get_group_id(0) * GROUP_Y + Y : get_global_id(0);
    const int first = chunk * chunk_size;
    const int last = i >= kept ? 0 : reduced - first < chunk_size ? reduced : first + chunk_size;
    float value = START;
    if (last > 0) {
        __global const float *x = BASE(x) + PLACE(kept, KEPT, i);
        for (int r = first + OWN; r < last; r += STEP) value = COMBINE(value, x[PLACE(reduced, REDUCED, r)]);
    }
    value = ACROSS(value, memory);
    if (OWN == 0 && i < kept) BASE(out)[(size_t)chunk * kept + i] = value * scale;
}
