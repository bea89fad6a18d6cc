import socket


def listen(host: str = "127.0.0.1", port: int = 0, *, backlog: int = socket.SOMAXCONN) -> socket.socket:
    """A listening TCP socket, IPv4 or IPv6 as *host* resolves; port 0 lets the kernel choose.

    Raises: OSError EADDRINUSE, EACCES, ...; socket.gaierror for an unknown host. See listen(2).
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by the connections: an answer in two pieces must not wait for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def endpoint(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{host}:{port}"
