// Put in front of every gpu_*.cl: what kernels for GPU-type devices share. Plain OpenCL C 1.2, no vectors.
//
// A work-group is GROUP_X x GROUP_Y work-items. GROUP_X, neighbours in memory where that can be, does what is coalesced:
// work-items that differ in get_local_id(0) read and write neighbouring elements wherever strides allow it.
//
// Arguments: TENSOR(x) declares two parameters, the buffer and the offset of the view's first element; BASE(x) is the
// pointer to that element. Strides and offsets count elements.
//
// Build constants: GROUP_X, GROUP_Y, powers of two, chosen by kernels_gpu*.py from the device's limits; SUBGROUPS: whether
// the device has sub-groups. What they compute is the same sum in another order; the order of every sum is fixed for a
// device and a shape. There are no atomics.
//
// Every barrier is reached by all work-items of a group: loops around one have bounds that are the same for all.

#pragma OPENCL FP_CONTRACT ON

#if SUBGROUPS && defined(cl_khr_subgroups)
#pragma OPENCL EXTENSION cl_khr_subgroups : enable
#define HAS_SUBGROUPS
#elif SUBGROUPS && defined(cl_intel_subgroups)
#pragma OPENCL EXTENSION cl_intel_subgroups : enable
#define HAS_SUBGROUPS
#endif

// Functions must be inlined before anything else happens to them. PoCL 3.0 gives each of its threads a local array of its
// own only where kernels use it; the optimizer moves one that all calls of a function have in common into the function,
// and then work-groups that run at the same time share it.
#define INLINE static inline __attribute__((always_inline))

#define GROUP_ITEMS (GROUP_X * GROUP_Y)
#define X ((int)get_local_id(0))
#define Y ((int)get_local_id(1))
#define ITEM (Y * GROUP_X + X)
#define BARRIER barrier(CLK_LOCAL_MEM_FENCE)

#define KERNEL __kernel __attribute__((reqd_work_group_size(GROUP_X, GROUP_Y, 1))) void
#define TENSOR(x) __global const float *x##_buffer, const int x##_offset
#define TENSOR_OUT(x) __global float *x##_buffer, const int x##_offset
#define TENSOR_INT64(x) __global const long *x##_buffer, const int x##_offset
#define BASE(x) (x##_buffer + x##_offset)

// The larger one, NaN if either is, as torch.maximum.
INLINE float maximum(float a, float b) { return a > b || a != a ? a : b; }
INLINE float minimum(float a, float b) { return a < b || a != a ? a : b; }

INLINE float add(float a, float b) { return a + b; }

// The larger one, NaN if b is: enough where a NaN shows anyway in what is computed next.
INLINE float larger(float a, float b) { return a > b ? a : b; }

// over_x(value, memory): `combine` of the values of all work-items of a row, those of one Y, given to each of them; over_y:
// of a column. A tree in local memory, which has GROUP_ITEMS elements and may be used again at once.
#define TREE(name, combine, size, index, step)                                                  \
    INLINE float name(const float value, __local float *memory)                          \
    {                                                                                           \
        memory[ITEM] = value;                                                                   \
        BARRIER;                                                                                \
        for (int half_size = (size) / 2; half_size > 0; half_size /= 2) {                       \
            if ((index) < half_size)                                                            \
                memory[ITEM] = combine(memory[ITEM], memory[ITEM + half_size * (step)]);        \
            BARRIER;                                                                            \
        }                                                                                       \
        const float result = memory[ITEM - (index) * (step)];                                   \
        BARRIER;                                                                                \
        return result;                                                                          \
    }

// The same where a row is the whole group: sub-groups first, then their results in order.
#define SUBGROUP_TREE(name, combine, reduce)                                                    \
    INLINE float name(const float value, __local float *memory)                          \
    {                                                                                           \
        const float own = reduce(value);                                                        \
        if (get_sub_group_local_id() == 0) memory[get_sub_group_id()] = own;                    \
        BARRIER;                                                                                \
        float result = memory[0];                                                               \
        for (int i = 1; i < (int)get_num_sub_groups(); i++) result = combine(result, memory[i]); \
        BARRIER;                                                                                \
        return result;                                                                          \
    }

#if defined(HAS_SUBGROUPS) && GROUP_Y == 1
SUBGROUP_TREE(sum_over_x, add, sub_group_reduce_add)
SUBGROUP_TREE(larger_over_x, larger, sub_group_reduce_max)
#else
TREE(sum_over_x, add, GROUP_X, X, 1)
TREE(larger_over_x, larger, GROUP_X, X, 1)
#endif
TREE(sum_over_y, add, GROUP_Y, Y, GROUP_X)
