//! Power cuts and full disks, on an ext4 image.
