"""What the device can do, measured: rates and latencies of the ops that plans are made of, stored as a profile, and the times of single sites."""

from approx_compile.machine.profile import DEVICES, FILE, Machine, Notice, Table, calibrate, current, device_name, load, path_of, stored, use

__all__ = ["DEVICES", "FILE", "Machine", "Notice", "Table", "calibrate", "current", "device_name", "load", "path_of", "stored", "use"]
