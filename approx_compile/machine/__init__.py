"""What the device can do, measured: rates and latencies of the ops that plans are made of, stored as a profile, and the times of single sites."""

from approx_compile.machine.calibration import calibrate, current
from approx_compile.machine.profile import Machine, Table
from approx_compile.machine.store import DEVICES, Notify, adopt, device_name, load, path_of, stored, use

__all__ = ["DEVICES", "Machine", "Notify", "Table", "adopt", "calibrate", "current", "device_name", "load", "path_of", "stored", "use"]
