"""What breaks drivers: shipped for the authors of third-party drivers, and used for our own (extra `testing`)."""
