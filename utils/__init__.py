"""What every room uses: errors, files, configuration, logging, distribution."""
