// Tensors in the memory of the host, and safetensors files (https://huggingface.co/docs/safetensors).
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/files.h"
#include "core/manifest.h"

namespace mdtrt {

// Contiguous elements that somebody else holds.
struct View {
    DType dtype;
    Shape shape;
    std::string_view bytes;
};

// Contiguous elements of its own.
struct Tensor {
    DType dtype = nullptr;
    Shape shape;
    std::string bytes;

    View view() const { return {dtype, shape, bytes}; }
};

// A safetensors file, mapped: its tensors are looked at where they lie.
class SafeTensors {
  public:
    SafeTensors(Mapped file, const std::string& path); // raises Error (BundleError): no whole file of that format

    const std::map<std::string, View>& tensors() const { return tensors_; }
    std::string_view bytes() const { return file_.bytes(); }

  private:
    Mapped file_;
    std::map<std::string, View> tensors_;
};

// Write a file: all of it or nothing.  Raises Error (LaunchError): it cannot be written.
void write_safetensors(const std::string& path, const std::map<std::string, View>& tensors);

// Write a text file: all of it or nothing.  Raises Error (LaunchError): it cannot be written.
void write_text(const std::string& path, std::string_view text);

// Refuse inputs that are not the program's, whole: raises Error (InputError), naming both sides.
void check_inputs(const std::map<std::string, View>& inputs, const Manifest& manifest);

// A rank's part of a whole input or output.
Tensor part_of(const View& whole, const Value& value, const Mesh& mesh, int64_t rank);
// The reverse: write the part where it lies in the whole.
void put_part(Tensor& whole, std::string_view part, const Value& value, const Mesh& mesh, int64_t rank);
// The first rank of those that hold the same part of a value as this one.
int64_t holder_of(const Value& value, const Mesh& mesh, int64_t rank);

// Check what a file of weights holds against what the segments take.  Raises Error (BundleError), naming both.
void check_weights(const SafeTensors& stored, const std::vector<Segment>& segments, const std::string& path);

// The transpose of a tensor of two dims.
std::string transposed(const View& tensor);

} // namespace mdtrt
