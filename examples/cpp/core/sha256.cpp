#include "core/sha256.h"

#include <openssl/evp.h>
#include <stdexcept>

#include "core/text.h"

namespace mdtrt {

std::string sha256(std::string_view bytes) {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned length = 0;
    if (EVP_Digest(bytes.data(), bytes.size(), digest, &length, EVP_sha256(), nullptr) != 1)
        throw std::runtime_error("OpenSSL has no sha256");
    return hex({reinterpret_cast<const char*>(digest), length});
}

} // namespace mdtrt
