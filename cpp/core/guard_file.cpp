// Reads the safetensors file of a guard: an 8-byte length, a JSON header that says where each
// tensor lies, and the tensors. The file may come from anywhere: nothing in it is trusted.
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <system_error>
#include <utility>
#include <vector>

#include "safetensors_header.h"
#include "tacext/guard.h"

namespace tacext {
namespace {

constexpr std::int64_t kParts = 4;

struct Refused {
  std::string why;
};

/// One tensor of the file, checked against the shape that it must have.
class Tensors {
 public:
  Tensors(const SafetensorsHeader& header, const char* data, std::size_t size)
      : header_(header), data_(data), size_(size) {}

  const SafetensorsHeader::Entry& entry(const std::string& name) const {
    const auto found = header_.tensors.find(name);
    if (found == header_.tensors.end()) throw Refused{"no tensor '" + name + "'"};
    return found->second;
  }

  template <class T>
  std::vector<T> read(const std::string& name, const std::vector<std::int64_t>& shape) {
    const SafetensorsHeader::Entry& e = entry(name);
    std::uint64_t count = 1, bytes = 0;
    bool huge = false;
    for (const std::int64_t length : shape)
      huge |= __builtin_mul_overflow(count, static_cast<std::uint64_t>(length), &count);
    huge |= __builtin_mul_overflow(count, sizeof(T), &bytes);
    const char* const dtype = sizeof(T) == 4 ? "F32" : "I64";
    if (huge || e.dtype != dtype || e.shape != shape || e.begin > e.end || e.end > size_ ||
        e.end - e.begin != bytes)
      throw Refused{"tensor '" + name + "' has another type, shape or place"};
    std::vector<T> values(static_cast<std::size_t>(count));
    if (count > 0) std::memcpy(values.data(), data_ + e.begin, values.size() * sizeof(T));
    for (const T value : values)
      if (!std::isfinite(static_cast<double>(value)))
        throw Refused{"tensor '" + name + "' is not finite"};
    ++read_;
    return values;
  }

  bool all_read() const { return read_ == header_.tensors.size(); }

 private:
  const SafetensorsHeader& header_;
  const char* data_;
  std::size_t size_;
  std::size_t read_ = 0;
};

std::string told(const SafetensorsHeader& header, const char* key) {
  const auto found = header.metadata.find(key);
  return found == header.metadata.end() ? std::string() : found->second;
}

double parse_rate(const std::string& text) {
  char* end = nullptr;
  const double rate = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(rate > 0 && rate < 1))
    throw Refused{"no false_positive_rate between 0 and 1"};
  return rate;
}

}  // namespace

struct GuardFile::Content {
  std::vector<float> mean, inverse_spread, basis, near_weight, far_weight, direction, location,
      inverse_deviation, knots, exceeding, head_norms;
  GuardTable table{};
  double rate = 0;

  Content(const SafetensorsHeader& header, const char* data, std::size_t size) {
    if (told(header, "format") != "tacext-guard") throw Refused{"not a guard"};
    if (told(header, "version") != "1")
      throw Refused{"a version of the format that this tacext does not know"};
    rate = parse_rate(told(header, "false_positive_rate"));
    Tensors tensors(header, data, size);
    const std::vector<std::int64_t> shape = tensors.entry("mean").shape;
    const std::vector<std::int64_t> basis_shape = tensors.entry("basis").shape;
    const std::vector<std::int64_t> knots_shape = tensors.entry("knots").shape;
    if (shape.size() != 2 || basis_shape.size() != 2 || knots_shape.size() != 1)
      throw Refused{"tensors of other shapes"};
    const std::int64_t classes = shape[0], latents = shape[1];
    const std::int64_t ranks = basis_shape[0], knot_count = knots_shape[0];
    if (classes < 2 || latents < 1 || knot_count < 1) throw Refused{"sizes out of range"};
    mean = tensors.read<float>("mean", {classes, latents});
    inverse_spread = tensors.read<float>("inverse_spread", {latents});
    basis = tensors.read<float>("basis", {ranks, latents});
    near_weight = tensors.read<float>("near_weight", {ranks + 1});
    far_weight = tensors.read<float>("far_weight", {ranks + 1});
    direction = tensors.read<float>("direction", {classes, latents});
    location = tensors.read<float>("location", {classes, kParts});
    inverse_deviation = tensors.read<float>("inverse_deviation", {classes, kParts});
    knots = tensors.read<float>("knots", {knot_count});
    exceeding = tensors.read<float>("exceeding", {knot_count + 1});
    head_norms = tensors.read<float>("head_norms", {classes});
    tensors.read<std::int64_t>("class_counts", {classes});
    const float threshold = tensors.read<float>("threshold", {})[0];
    const std::int64_t samples = tensors.read<std::int64_t>("samples", {})[0];
    if (!tensors.all_read()) throw Refused{"tensors that no guard has"};
    if (samples < 1) throw Refused{"no calibration samples"};
    for (std::size_t i = 1; i < knots.size(); ++i)
      if (knots[i] < knots[i - 1]) throw Refused{"a calibration out of order"};
    for (std::size_t i = 1; i < exceeding.size(); ++i)
      if (exceeding[i] > exceeding[i - 1]) throw Refused{"a calibration out of order"};
    table = {classes,
             latents,
             ranks,
             knot_count,
             mean.data(),
             inverse_spread.data(),
             basis.data(),
             near_weight.data(),
             far_weight.data(),
             direction.data(),
             location.data(),
             inverse_deviation.data(),
             knots.data(),
             exceeding.data(),
             threshold,
             samples};
  }
};

GuardFile::GuardFile(std::unique_ptr<Content> content) : content_(std::move(content)) {}
GuardFile::~GuardFile() = default;

const GuardTable& GuardFile::table() const { return content_->table; }
double GuardFile::false_positive_rate() const { return content_->rate; }
const float* GuardFile::head_norms() const { return content_->head_norms.data(); }

std::unique_ptr<GuardFile> GuardFile::parse(const void* bytes, std::size_t size,
                                            std::string* error) {
  const auto refuse = [error](const std::string& why) {
    if (error != nullptr)
      *error =
          "GuardFile: bytes: expected what tacext.Guard.save wrote, got a truncated, damaged "
          "or foreign file (" +
          why + "); copy it again, or fit the guard again";
    return nullptr;
  };
  try {
    std::string why;
    SafetensorsHeader header;
    const char* const data = static_cast<const char*>(bytes);
    const std::size_t start = read_safetensors_header(data, size, &header, &why);
    if (start == 0) return refuse(why);
    auto content = std::make_unique<Content>(header, data + start, size - start);
    return std::unique_ptr<GuardFile>(new GuardFile(std::move(content)));
  } catch (const Refused& refused) {
    return refuse(refused.why);
  }
}

std::unique_ptr<GuardFile> GuardFile::read(const char* path, std::string* error) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes;
  bool whole = file.is_open();
  if (whole) {
    file.seekg(0, std::ios::end);
    const std::streamoff size = file.tellg();
    whole = size >= 0 && size <= std::streamoff{1} << 40;  // a directory claims far more
    if (whole) {
      bytes.resize(static_cast<std::size_t>(size));
      file.seekg(0);
      whole = bytes.empty() || static_cast<bool>(file.read(bytes.data(), size));
    }
  }
  if (!whole) {
    if (error != nullptr)
      *error = std::string("GuardFile: path: expected a file that can be read, got ") + path +
               "; check the path and its permissions";
    return nullptr;
  }
  return parse(bytes.data(), bytes.size(), error);
}

}  // namespace tacext
