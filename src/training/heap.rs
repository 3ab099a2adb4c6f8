//! Memory of large tensors on a CPU, apart from everything else that a process allocates.
//!
//! A step's tensors are freed together, and their space would be whole again for the next step's, which are of other sizes:
//! but for what others keep from between them, such as the code that oneDNN generates for every new size of a product. In one
//! heap with these a run of SAPO-ORPO with SmolLM2 had gaps of 1.2 GB after fifty steps, and more with every step; apart, 3 MB.
//! So the tensors have a range of addresses to themselves, of which only what has been used takes memory. What is freed is
//! kept for the next tensor: its pages would cost more to get again than to keep.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use range_alloc::RangeAllocator;

/// Smaller tensors are not worth a page of their own.
const LEAST_BYTES: usize = 1 << 16;

/// Sizes are multiples of this, and places too.
const PAGE: usize = 1 << 12;

/// Addresses of its own for the whole process.
struct Heap {
    start: usize,
    bytes: usize,
    places: Mutex<Places>,
}

/// In pages from the start.
struct Places {
    free: RangeAllocator<usize>,
    /// Length by start.
    taken: HashMap<usize, usize>,
}

impl Heap {
    /// As many addresses as the machine has memory; none where the system does not give them.
    fn reserve() -> Option<Heap> {
        // Safety: only asks for numbers.
        let [pages, page] = [libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|name| unsafe { libc::sysconf(name) });
        let bytes = usize::try_from(pages).ok()?.checked_mul(usize::try_from(page).ok()?)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // Safety: a new range, where the system chooses, which overlaps no other.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, access, kind, -1, 0) };
        let places = Places { free: RangeAllocator::new(0..bytes / PAGE), taken: HashMap::new() };
        (start != libc::MAP_FAILED).then(|| Heap { start: start as usize, bytes, places: Mutex::new(places) })
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of so many bytes; none where they are too few, or too many.
    fn take(&self, bytes: usize) -> Option<usize> {
        let pages = Some(bytes).filter(|bytes| *bytes >= LEAST_BYTES)?.div_ceil(PAGE);
        let mut places = self.places();
        let place = places.free.allocate_range(pages).ok()?;
        places.taken.insert(place.start, pages);
        Some(self.start + place.start * PAGE)
    }

    /// Whether there was something at this address, which is free now.
    fn give_back(&self, address: usize) -> bool {
        let Some(offset) = address.checked_sub(self.start).filter(|offset| *offset < self.bytes) else { return false };
        let mut places = self.places();
        let Some(pages) = places.taken.remove(&(offset / PAGE)) else { return false };
        places.free.free_range(offset / PAGE..offset / PAGE + pages);
        true
    }
}

static HEAP: OnceLock<Option<Heap>> = OnceLock::new();

fn heap() -> Option<&'static Heap> {
    HEAP.get().and_then(Option::as_ref)
}

extern "C" fn take(bytes: usize) -> *mut c_void {
    heap().and_then(|heap| heap.take(bytes)).map_or(ptr::null_mut(), |address| address as *mut c_void)
}

extern "C" fn give_back(place: *mut c_void) -> bool {
    heap().is_some_and(|heap| heap.give_back(place as usize))
}

unsafe extern "C" {
    fn sapo_place_tensors(take: extern "C" fn(usize) -> *mut c_void, give_back: extern "C" fn(*mut c_void) -> bool);
}

/// From here on large tensors on a CPU are in memory of their own. Where the system gives no such range of addresses, they
/// stay with the C allocator.
pub fn place_tensors() {
    let mut is_new = false;
    let heap = HEAP.get_or_init(|| {
        is_new = true;
        Heap::reserve()
    });
    if is_new && heap.is_some() {
        // Safety: both functions can be called on any thread for as long as the process is there.
        unsafe { sapo_place_tensors(take, give_back) };
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn what_is_given_back_is_whole_again() {
        let heap = Heap::reserve().unwrap();
        // Three megabytes side by side, the last one a byte short.
        let size = 1 << 20;
        let [first, second, third] = [size, size, size - 1].map(|bytes| heap.take(bytes).unwrap());
        assert_eq!((first, second, third), (heap.start, heap.start + size, heap.start + 2 * size));
        assert!(heap.give_back(first) && heap.give_back(second));
        // Smaller gaps first, and both together hold one of twice the size.
        assert_eq!(heap.take(2 * size), Some(first));
        assert!(!heap.give_back(second), "no longer the beginning of anything");
        assert!(heap.give_back(third) && heap.give_back(first));
        assert_eq!(heap.take(5 * size), Some(first));
    }

    #[test]
    fn small_places_and_impossible_ones_are_others_business() {
        let heap = Heap::reserve().unwrap();
        assert_eq!((heap.take(LEAST_BYTES - 1), heap.take(heap.bytes + 1), heap.take(usize::MAX)), (None, None, None));
        let elsewhere = Box::new(0u8);
        assert!(!heap.give_back(ptr::from_ref(&*elsewhere) as usize));
    }

    #[test]
    fn large_tensors_live_there() {
        place_tensors();
        place_tensors();
        let inside = |tensor: &Tensor| {
            let (address, heap) = (tensor.data_ptr() as usize, heap().unwrap());
            (heap.start..heap.start + heap.bytes).contains(&address)
        };
        let [small, large] = [10, 1 << 20].map(|size| Tensor::ones([size], (Kind::Float, Device::Cpu)));
        assert_eq!((inside(&small), inside(&large)), (false, true));
        assert_eq!((&large + &large).sum(Kind::Float).double_value(&[]), f64::from(2 << 20));
        // It may be freed on another thread.
        std::thread::spawn(move || drop(large)).join().unwrap();
    }
}
