#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace tacext {

/// The header of a safetensors file.
struct SafetensorsHeader {
  struct Entry {
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::uint64_t begin = 0, end = 0;  ///< bytes, counted from the end of the header
  };
  std::map<std::string, std::string> metadata;
  std::map<std::string, Entry> tensors;
};

/// So many bytes of a file hold its header, or it is refused.
constexpr std::uint64_t kLargestHead = std::uint64_t{1} << 20;

/// Where the tensors begin, in bytes; 0 where these are not the first `size` bytes of a safetensors
/// file of `file_size` bytes, and *why says what is wrong. The tensors cover the rest of the file,
/// each byte once.
std::size_t read_safetensors_header(const char* bytes, std::size_t size, std::uint64_t file_size,
                                    SafetensorsHeader* header, std::string* why);

}  // namespace tacext
