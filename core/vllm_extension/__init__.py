"""What a vLLM server can be given to serve pools faster; imported by the server, never by the client."""
