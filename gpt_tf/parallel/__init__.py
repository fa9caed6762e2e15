"""Article 3.1, parallel computation: the work in parts, each part on a device."""
