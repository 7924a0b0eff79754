"""Where the text comes from: Debian packages, upstream downloads, a local folder."""
