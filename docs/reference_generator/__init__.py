"""The pages of docs/reference/, each written from the code: commands, Python names, HTTP API."""
