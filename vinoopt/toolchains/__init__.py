"""What makes code for a target: devices that are here, and vendor compilers for those that are not."""
