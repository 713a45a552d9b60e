"""The decoder: its passes, the sequences that they read and write, and what these hold on the device."""
