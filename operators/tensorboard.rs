//! Scalars in TensorBoard's event files.
//!
//! An event file is a sequence of TFRecords: length (u64), masked CRC-32C of the length, payload, masked CRC-32C of the
//! payload, all little-endian (tensorflow/core/lib/io/record_writer.h). A payload is one protobuf `Event`
//! (tensorflow/core/util/event.proto), of which scalars need four fields; they are encoded by hand here.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use crc::{CRC_32_ISCSI, Crc};

use crate::Error;
use crate::log_file::LogFile;

const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// An event file being written.
#[derive(Debug)]
pub struct EventFile {
    file: LogFile,
}

impl EventFile {
    /// Open the event file at `path`; a fresh one begins with the version record that readers expect.
    pub fn open(path: PathBuf, resumed: bool) -> Result<Self, Error> {
        let mut file = LogFile::open(path, resumed)?;
        if !resumed {
            file.append(&record(&version_event(wall_time())))?;
        }
        Ok(EventFile { file })
    }

    /// Append one event that holds all these scalars.
    pub fn scalars<'a>(
        &mut self,
        step: u64,
        values: impl IntoIterator<Item = (&'a String, &'a f64)>,
    ) -> Result<(), Error> {
        self.file.append(&record(&scalar_event(wall_time(), step, values)))
    }

    /// See [`LogFile::sync`].
    pub fn sync(&mut self) -> Result<u64, Error> {
        self.file.sync()
    }

    /// See [`LogFile::cut_back`].
    pub fn cut_back(&mut self, length: u64) -> Result<(), Error> {
        self.file.cut_back(length)
    }
}

/// Seconds since 1970; TensorBoard shows them, nothing is computed from them.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

/// A payload framed as a TFRecord.
fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut bytes = Vec::with_capacity(payload.len() + 16);
    bytes.extend(length);
    bytes.extend(masked_crc(&length).to_le_bytes());
    bytes.extend(payload);
    bytes.extend(masked_crc(payload).to_le_bytes());
    bytes
}

/// TFRecord's checksum: CRC-32C, rotated and offset so that checksums of data holding checksums stay good.
fn masked_crc(data: &[u8]) -> u32 {
    CRC32C.checksum(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// `Event { wall_time, file_version }`.
fn version_event(wall_time: f64) -> Vec<u8> {
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time);
    put_bytes(&mut event, 3, b"brain.Event:2");
    event
}

/// `Event { wall_time, step, summary: Summary { value: [Value { tag, simple_value }] } }`.
fn scalar_event<'a>(wall_time: f64, step: u64, values: impl IntoIterator<Item = (&'a String, &'a f64)>) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, number) in values {
        let mut value = Vec::new();
        put_bytes(&mut value, 1, tag.as_bytes());
        put_float(&mut value, 2, *number as f32);
        put_bytes(&mut summary, 1, &value);
    }
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time);
    put_key(&mut event, 2, 0);
    put_varint(&mut event, step);
    put_bytes(&mut event, 5, &summary);
    event
}

/// A field's number and wire type: 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes.
fn put_key(bytes: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(bytes, field << 3 | wire_type);
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn put_double(bytes: &mut Vec<u8>, field: u64, value: f64) {
    put_key(bytes, field, 1);
    bytes.extend(value.to_le_bytes());
}

fn put_float(bytes: &mut Vec<u8>, field: u64, value: f32) {
    put_key(bytes, field, 5);
    bytes.extend(value.to_le_bytes());
}

fn put_bytes(bytes: &mut Vec<u8>, field: u64, value: &[u8]) {
    put_key(bytes, field, 2);
    put_varint(bytes, value.len() as u64);
    bytes.extend(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// RFC 3720, appendix B.4.
    #[test]
    fn the_checksum_is_crc32c() {
        assert_eq!(CRC32C.checksum(&[0; 32]), 0x8a91_36aa);
        assert_eq!(CRC32C.checksum(&[0xff; 32]), 0x62a8_ab43);
    }

    /// The bytes that TensorBoard 2.21's own RecordWriter wrote for the same events.
    #[test]
    fn records_are_those_of_tensorboard() {
        assert_eq!(
            hex(&record(&version_event(1.5))),
            "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
        );
        let values = [("loss".to_string(), 0.25), ("rewards/margins".to_string(), -2.0)];
        let event = scalar_event(1.5, 300, values.iter().map(|(tag, number)| (tag, number)));
        assert_eq!(
            hex(&record(&event)),
            "33000000000000000ca7205609000000000000f83f10ac022a250a0b0a046c6f7373150000803e0a160a0f726577617264732f6d\
             617267696e7315000000c0a0ee164e"
        );
    }
}
