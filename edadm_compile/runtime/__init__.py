"""Loading and running compiled programs. Imports neither passes, calibration nor export."""
