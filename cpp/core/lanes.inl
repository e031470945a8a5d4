// Vectors of kBytes, for kernels that are compiled once for each instruction set (see simd.h):
// included into a namespace of that set which defines kBytes, also as TACEXT_KERNEL_BYTES.

template <class T, int kSize = kBytes>
struct Lanes {
  typedef T type __attribute__((vector_size(kSize)));
};

template <class Vector, class T>
TACEXT_INLINE void load(Vector& to, const T* from) {
  __builtin_memcpy(&to, from, sizeof to);
}

// The largest lane, halving the vector until one is left.
template <class T, int kSize = kBytes>
TACEXT_INLINE T largest(const typename Lanes<T, kSize>::type& v) {
  if constexpr (kSize == sizeof(T)) {
    return v[0];
  } else {
    typename Lanes<T, kSize / 2>::type low, high;
    __builtin_memcpy(&low, &v, kSize / 2);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + kSize / 2, kSize / 2);
    low = high > low ? high : low;
    return largest<T, kSize / 2>(low);
  }
}

// One bit for each lane that is above the bound.
#if !defined(__x86_64__)
template <class T>
TACEXT_INLINE std::uint64_t lanes_above(const typename Lanes<T>::type& a, T bound) {
  std::uint64_t bits = 0;
  for (std::size_t i = 0; i < kBytes / sizeof(T); ++i)
    bits |= static_cast<std::uint64_t>(a[i] > bound) << i;
  return bits;
}
#elif TACEXT_KERNEL_BYTES == 64
template <class T>
TACEXT_INLINE std::uint64_t lanes_above(const typename Lanes<T>::type& a, T bound) {
  if constexpr (sizeof(T) == 1)
    return _mm512_cmpgt_epi8_mask((__m512i)a, _mm512_set1_epi8(bound));
  else if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(bound), _CMP_GT_OQ);
  else
    return _mm512_cmp_pd_mask((__m512d)a, _mm512_set1_pd(bound), _CMP_GT_OQ);
}
#elif TACEXT_KERNEL_BYTES == 32
template <class T>
TACEXT_INLINE std::uint64_t lanes_above(const typename Lanes<T>::type& a, T bound) {
  int bits;
  if constexpr (sizeof(T) == 1)
    bits = _mm256_movemask_epi8(_mm256_cmpgt_epi8((__m256i)a, _mm256_set1_epi8(bound)));
  else if constexpr (sizeof(T) == 4)
    bits = _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_set1_ps(bound), _CMP_GT_OQ));
  else
    bits = _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, _mm256_set1_pd(bound), _CMP_GT_OQ));
  return static_cast<std::uint32_t>(bits);
}
#else
template <class T>
TACEXT_INLINE std::uint64_t lanes_above(const typename Lanes<T>::type& a, T bound) {
  int bits;
  if constexpr (sizeof(T) == 1)
    bits = _mm_movemask_epi8(_mm_cmpgt_epi8((__m128i)a, _mm_set1_epi8(bound)));
  else if constexpr (sizeof(T) == 4)
    bits = _mm_movemask_ps(_mm_cmpgt_ps((__m128)a, _mm_set1_ps(bound)));
  else
    bits = _mm_movemask_pd(_mm_cmpgt_pd((__m128d)a, _mm_set1_pd(bound)));
  return static_cast<std::uint32_t>(bits);
}
#endif
