//! What can go wrong between here and the GPU.

use cudarc::driver::DriverError;
use kvmp_client::ClientError;
use kvmp_client::copy::CopyError;

/// Why a device, a registration or a copy failed.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// No driver on this machine.
    #[error("no CUDA driver (libcuda.so) on this machine")]
    NoDriver,
    /// The driver refused a call.
    #[error("{what}: {why}")]
    Driver {
        /// What was tried.
        what: &'static str,
        /// The driver's words.
        why: String,
    },
    /// The driver is older than CUDA 12.8.
    #[error("this GPU's driver has no batched copies: they came with CUDA 12.8")]
    NoBatches,
    /// Runs, or what lies between them, are no multiples of the kernel's vectors.
    #[error("the gather kernel moves whole vectors of 16 bytes, and this layout's runs do not consist of such")]
    NoVectors,
    /// What is to be copied is not what the client's part can hold; no byte has moved.
    #[error(transparent)]
    Input(#[from] ClientError),
}

impl From<CopyError> for CudaError {
    fn from(error: CopyError) -> Self {
        Self::Input(error.into())
    }
}

/// Puts what was tried before the driver's words.
pub(crate) trait Doing<T> {
    fn doing(self, what: &'static str) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, what: &'static str) -> Result<T, CudaError> {
        self.map_err(|error| CudaError::Driver { what, why: words(error) })
    }
}

/// Name and text, as in "CUDA_ERROR_INVALID_VALUE (invalid argument)".
fn words(error: DriverError) -> String {
    let text = |found: Result<&std::ffi::CStr, DriverError>| {
        found.map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_name()), text(error.error_string()))
}
