#!/usr/bin/env python3
"""A proxy server for SOCKS4, SOCKS4a, SOCKS5 and HTTP, and a client that replaces PySocks.

One file, for Python 3.6 and newer, that needs the standard library only.

Run a proxy::

    python socks.py -p 1080

Embed one, for example in a test suite; port 0 takes a free port::

    with socks.Server(('127.0.0.1', 0)).start() as server:
        print(f'socks5h://{server.server_address}')

Connect through one; PySocks' names work too::

    socks.create_connection(('example.org', 80), proxy='socks5h://127.0.0.1:1080')

Specifications
--------------

- SOCKS4 and SOCKS4a (Ying-Da Lee), SOCKS5 (RFC 1928), its user names and passwords (RFC 1929) and
  its GSSAPI method (RFC 1961)
- SOCKS6, an individual draft that has expired (draft-olteanu-intarea-socks-6-11)
- HTTP proxies: RFC 9110, RFC 9112, Basic authentication (RFC 7617)
- connecting to a name with several addresses: RFC 8305; internationalized names: RFC 3490, RFC 5892
- the PROXY protocol, versions 1 and 2 (HAProxy); ident (RFC 1413); RESOLVE and RESOLVE_PTR (Tor's
  socks-extensions)
- UDP inside TCP: the command 05 of hev-socks5-server

Not supported
-------------

- IPv6 addresses and passwords in SOCKS4, which has neither; SOCKS4a clients can send an IPv6
  address as a name
- BIND through the server's upstream proxies
- UDP ASSOCIATE inside TLS: its datagrams go beside it, in the clear or not at all
  (--udp-over-plain); UDP inside TCP has them in the connection
- sending SOCKS5 fragments: the server reassembles those of its clients, a client drops those of its
  proxy
- GSSAPI by other libraries than MIT Kerberos on Linux, in HTTP, and in SOCKS6
- SOCKS6: sessions, idempotence tokens, multipath TCP, ports and error messages for datagrams, a
  port of the client's choice for BIND; TCP Fast Open to targets, which might get the first data
  twice
- HTTP: a cache, a filter of content, more than one forwarded request on a connection, HTTP/2, URLs
  of other schemes than http:, other passwords than Basic ones
- connecting through a proxy without blocking by `socksocket` on other systems than Linux;
  open_connection() and create_datagram_endpoint() are for asyncio

Sections
--------

Each section uses only those before it, but rules parse the proxies they name.

words           numbers of the protocols: methods, commands, address types, replies
errors          exceptions, and the reply for each
wire format     messages with pack() and unpack(); no socket is touched
sockets         conversations, streams, TLS and GSSAPI, look-ups, dialling, listening
access          settings, users, networks, rules: who may do what
loops           selector, timers, tasks, pool of threads, resolver
relays          tunnels for TCP, relays for UDP
client          proxies and chains of them
server          `Handler` and `Server`
socket face     `socksocket` and PySocks' functions
operation       a process: signals, workers, systemd, log files
command line    options, main()

Paths
-----

A connection to the server, served by a `Handler`::

    Server._accept -> Handler.conversation -> negotiate -> do_CONNECT -> Server.authorize -> dial
    -> reply -> Tunnel -> Tunnel.close: sockets closed, counters booked, one log line

A datagram; the bytes of its header are the key to its target, so it is parsed only once::

    UdpRelay.from_client -> new header: Routes.forward (resolve, Server.authorize) -> Burst: sendto
    or sendmsg, of a UDP socket or of an association at another proxy
    UdpRelay.from_target -> header of the sender, payload -> Burst

A connection through a proxy, as a client::

    create_connection -> socksocket.connect -> open_chain: connect to the first proxy, and by
    negotiate_chain have each proxy connect to the next -> the socket

Where to look
-------------

protocol of a client, by its first byte       Handler.negotiate
messages in pieces, or several at once        Stream.read
data that a client sends too early            Handler.join, Tunnel.start
who needs a login, and its limit              Handler.needs_login, Handler.authenticate, Failures
from where, and how often                     Server.admit, Settings.max_per_client
clients that send nothing                     Sessions.add, Settings.handshake_timeout
no descriptors left                           Server._accept, Server._room, Server.starve
what a client may reach                       Server.authorize, Rules
names, and each of their addresses            Server.permitted, Server.destinations, Resolver
the way to a target, if several are possible  Server.find_ways, dial
failures of another proxy on the way          Handler.connect_through, negotiating
the reply to an error                         Handler.refuse, reply_for
the bound address (BND) in a reply            Handler.join, Handler.own_address
a client that leaves while it waits           Task.ready, Stream.wait_for, dial
addresses that do not answer                  dial, Race
half-closed, reset, slow, idle tunnels        Pipe, Tunnel.patience, Tunnel.close
TLS and GSSAPI, and floods in them            Layer, TlsLayer, GssContext
HTTP requests that could be read in two ways  HttpHead, HttpRequest, HttpBody, HttpForward
datagrams of strangers, and to names          UdpRelay.admit, Routes
many datagrams by one system call             Burst
datagrams in TCP, or by one port for all      StreamDatagrams, UdpRelay, SharedPort
datagrams by way of another proxy             FarAssociation, open_association, Association
one round trip to connect                     Flight, open_chain
connect() of a non-blocking `socksocket`      Attempt
new settings (HUP)                            Service.reload, Server.reconfigure
new settings while a client negotiates        Handler.check_again
the end (TERM, INT)                           Service.stop, Server.drain, Server.server_close
workers that end, or hang                     Supervisor, Pulse
the log, and a full disk                      Session.report, LogLine, LogWriter
programs that could connect past the proxy    wrap_module, ImportGuard, VirtualAddresses

Conversations
-------------

Everything that takes time is a conversation: a generator that yields what it waits for, a `Wait`,
a `Call` or a `LookUp`, and is resumed with the result.  A `Loop`, one thread with one selector,
drives those of all clients; it accepts, negotiates, connects and relays.  As a client, run() drives
one in the calling thread.

Why not a thread for each connection, which is simpler?  Because of the cost: with threads, 0.36 to
0.40 ms of CPU time a connection were measured, over half of it futex wake-ups, as threads take
turns with the interpreter lock; with generators in a loop, 0.18 ms.  A silent client costs a
generator instead of a thread.

Other threads do what would hold up the loop:

- a pool (`BlockingPool`): name look-ups, and CPU-bound calls (password hashes, RSA handshakes)
- bulk loops (`BulkLoops`): tunnels with heavy traffic; their large reads and writes release the
  interpreter lock, so they run in parallel
- a new thread for each do_COMMAND method that is an ordinary function: it may block
- the log writer (`LogWriter`): a full disk or a stuck reader of the log blocks no client
"""

import _socket
import argparse
import array
import atexit
import codecs
import contextlib
import enum
import errno
import functools
import io
import ipaddress
import itertools
import logging
import mmap
import operator
import os
import re
import select
import selectors
import signal
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
import unicodedata
import weakref
from binascii import a2b_base64, b2a_base64
from collections import Counter, OrderedDict, deque
from types import MappingProxyType
from typing import (TYPE_CHECKING, Any, Callable, Dict, Generator, Iterable, Iterator, List,
                    Mapping, NamedTuple, Optional, Sequence, Tuple, Type, TypeVar, Union, overload)

try:
    import fcntl
    import resource
except ImportError:                     # Windows has neither
    fcntl = resource = None
try:
    from contextvars import ContextVar
except ImportError:                     # Python 3.6
    ContextVar = None

if TYPE_CHECKING:
    import asyncio
    import ssl

# What programs use.  getaddrinfo() is public too, but `import *` must not replace socket's.
__all__ = [
    # The server
    'Server', 'Handler', 'Session', 'LogLine', 'Settings', 'Tunnel', 'UdpRelay', 'main',
    # Settings
    'Rule', 'parse_rule', 'read_rules', 'parse_network', 'read_users', 'Hashed', 'tls_context',
    # Conversations
    'Wait', 'Call', 'Worker', 'LookUp', 'run', 'resolve', 'dial',
    # Messages
    'reader', 'Address', 'UNSPECIFIED', 'Greeting', 'Choice', 'Credentials', 'Verdict', 'Request',
    'Response', 'Request4', 'Response4', 'Request6', 'Verdict6', 'Response6', 'Option', 'Datagram',
    'GssMessage', 'HttpConnect', 'HttpStatus', 'HttpHead', 'HttpRequest', 'HttpAnswer',
    'ProxyHeader', 'IdentQuery', 'IdentReply',
    # Enumerations
    'Method', 'Command', 'AddressType', 'Reply', 'Reply4', 'HttpCode',
    # Errors
    'ProxyError', 'ProxyConnectionError', 'ProxyConnectionTimeoutError', 'GeneralProxyError',
    'ProxyTimeoutError', 'ProtocolError', 'SOCKS5AuthError', 'SOCKS5Error', 'SOCKS4Error',
    'HTTPError', 'Refused', 'FileError', 'ClientReset', 'reply_for',
    # The client
    'socksocket', 'create_connection', 'create_server', 'open_connection',
    'create_datagram_endpoint', 'Proxy', 'parse_proxy_url', 'parse_chain', 'default_proxy',
    'set_default_proxy', 'get_default_proxy', 'proxy_from_environment', 'is_bypassed',
    'wrap_module', 'unwrap_module', 'TLS', 'GSSAPI', 'OPTIMISTIC', 'UDP_IN_TCP',
    'SOCKS6',
    # The other names of PySocks, and of SocksiPy before it
    'SOCKS4', 'SOCKS5', 'HTTP', 'PROXY_TYPE_SOCKS4', 'PROXY_TYPE_SOCKS5', 'PROXY_TYPE_HTTP',
    'PROXY_TYPES', 'PRINTABLE_PROXY_TYPES', 'DEFAULT_PORTS', 'SOCKS4_ERRORS', 'SOCKS5_ERRORS',
    'setdefaultproxy', 'getdefaultproxy', 'wrapmodule', 'unwrapmodule', 'set_self_blocking', 'log',
    'Socks5AuthError', 'Socks5Error', 'Socks4Error',
]

# The annotations are for type checkers of programs that import this module.  The bodies of the
# functions here are not checked: they are tested.
# mypy: ignore-errors
# pyright: basic, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
# pyright: reportInconsistentOverload=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalCall=false, reportOptionalIterable=false, reportOptionalMemberAccess=false
# pyright: reportOptionalContextManager=false, reportOptionalOperand=false
# pyright: reportOptionalSubscript=false
# pyright: reportPossiblyUnboundVariable=false, reportRedeclaration=false, reportReturnType=false

__version__ = '2.1.0'

IS_PROGRAM = __name__ == '__main__'
if IS_PROGRAM:      # pickles name the module, and other processes know it as "socks"
    __name__ = 'socks'
    sys.modules.setdefault(__name__, sys.modules['__main__'])

log = logging.getLogger('socks')

# The originals.  A program may replace them with those of this module, which must not call itself.
_orig_socket = socket.socket
_orgsocket = _orig_socket
_orig_getaddrinfo = socket.getaddrinfo

Read = Callable[[int], bytes]           # read(n) returns exactly n bytes, or raises EOFError
Conversation = Generator[Any, Any, Any]
Result = TypeVar('Result')
Function = TypeVar('Function', bound=Callable[..., Any])
Serving = TypeVar('Serving', bound='Server')
ProtocolType = TypeVar('ProtocolType', bound='asyncio.BaseProtocol')
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
# What fields of `Settings` may be: also the texts of the command line.
NetworksArgument = Union[str, Sequence[Union[str, Network]]]
HostsArgument = Union[str, Sequence[str]]
# Names are str or bytes, but a Dict[str, str] is no Mapping[Union[str, bytes], object].
UsersArgument = Mapping[Any, object]
ServerAddress = Union[Tuple[str, int], Sequence[Tuple[str, int]]]
AnyRequest = Union['Request', 'Request4', 'Request6']
Secret = Union[str, bytes, None]        # user name or password
ProxyArgument = Union[str, Sequence[object], None]      # URL, arguments of set_proxy(), or a chain
ProxyType = Union[int, str, Sequence[object], None]
ProxyTuple = Tuple[Any, Optional[str], Optional[int], bool, Optional[bytes], Optional[bytes]]


# ------------------------------------------------------------------------------------------ words

class Method(enum.IntEnum):
    """Authentication methods (RFC 1928 section 3)."""
    NO_AUTHENTICATION = 0x00
    GSSAPI = 0x01
    USERNAME_PASSWORD = 0x02
    NO_ACCEPTABLE = 0xFF


class Command(enum.IntEnum):
    """Commands of a request (RFC 1928 section 4)."""
    NOOP = 0x00                         # SOCKS6 only
    CONNECT = 0x01
    BIND = 0x02
    UDP_ASSOCIATE = 0x03
    UDP_IN_TCP = 0x05                   # hev-socks5-server's: datagrams in the TCP connection
    RESOLVE = 0xF0                      # Tor's socks-extensions.txt, section 2
    RESOLVE_PTR = 0xF1
    FORWARD = 0x100                     # any HTTP method but CONNECT; no byte of SOCKS can equal it


class NamedCommand(int):
    """A command with another name for logs: for rules, it is the same as `command`."""

    def __new__(cls, command, name):
        named = int.__new__(cls, command)
        named._name_ = name
        return named


class AddressType(enum.IntEnum):
    """Address types, ATYP (RFC 1928 section 5)."""
    IPV4 = 0x01
    DOMAINNAME = 0x03
    IPV6 = 0x04


class Code(enum.IntEnum):
    """A reply code, a number, with the text that explains it."""
    text: str

    def __new__(cls, code: int, text: str) -> 'Code':
        member = int.__new__(cls, code)
        member._value_ = code
        member.text = text
        return member


class Reply(Code):
    """Reply codes, REP (RFC 1928 section 6)."""
    SUCCEEDED = 0x00, 'Succeeded'
    GENERAL_FAILURE = 0x01, 'General SOCKS server failure'
    NOT_ALLOWED = 0x02, 'Connection not allowed by ruleset'
    NETWORK_UNREACHABLE = 0x03, 'Network unreachable'
    HOST_UNREACHABLE = 0x04, 'Host unreachable'
    CONNECTION_REFUSED = 0x05, 'Connection refused'
    TTL_EXPIRED = 0x06, 'TTL expired'
    COMMAND_NOT_SUPPORTED = 0x07, 'Command not supported, or protocol error'
    ADDRESS_TYPE_NOT_SUPPORTED = 0x08, 'Address type not supported'
    TIMED_OUT = 0x09, 'Connection attempt timed out'        # SOCKS6 only


class Reply4(Code):
    """Reply codes of SOCKS4, its field CD."""
    GRANTED = 0x5A, 'Request granted'
    REJECTED = 0x5B, 'Request rejected or failed'
    NO_IDENTD = 0x5C, 'Request rejected because SOCKS server cannot connect to identd on the client'
    IDENT_MISMATCH = 0x5D, ('Request rejected because the client program and identd report '
                            'different user-ids')


class HttpCode(Code):
    """Status codes of HTTP that the server answers with (RFC 9110 section 15)."""
    OK = 200, 'Connection established'
    BAD_REQUEST = 400, 'Bad Request'
    FORBIDDEN = 403, 'Forbidden'
    LOGIN_REQUIRED = 407, 'Proxy Authentication Required'
    HEAD_TOO_LARGE = 431, 'Request Header Fields Too Large'     # RFC 6585 section 5
    NOT_IMPLEMENTED = 501, 'Not Implemented'
    BAD_GATEWAY = 502, 'Bad Gateway'
    GATEWAY_TIMEOUT = 504, 'Gateway Timeout'
    VERSION_NOT_SUPPORTED = 505, 'HTTP Version Not Supported'


# The HTTP status for a `Reply`; BAD_GATEWAY for any other.
HTTP_CODES = {
    Reply.SUCCEEDED: HttpCode.OK,
    Reply.NOT_ALLOWED: HttpCode.FORBIDDEN,
    Reply.TTL_EXPIRED: HttpCode.GATEWAY_TIMEOUT,
    Reply.COMMAND_NOT_SUPPORTED: HttpCode.NOT_IMPLEMENTED,
}


# ----------------------------------------------------------------------------------------- errors

class ProxyError(OSError):
    """Base class of the errors of this module.

    msg         what went wrong, with the text of `socket_err`
    socket_err  the error that caused this one, or None
    reply       the `Reply` that the server sends for this error, or the code that a proxy sent
    proxy       the `Proxy` of the chain that failed, without user name and password, or None if it
                is not known
    target      the `Address` that this proxy was asked for, or None
    """
    reply: int = Reply.GENERAL_FAILURE
    proxy: Optional['Proxy'] = None
    target: Optional['Address'] = None

    def __init__(self, msg: str, socket_err: Optional[BaseException] = None,
                 reply: Optional[int] = None) -> None:
        super().__init__(msg)
        self.msg = msg if socket_err is None else f'{msg}: {socket_err}'
        self.socket_err = socket_err
        if reply is not None:
            self.reply = reply

    def __str__(self) -> str:
        return f'{self.msg} ({self.proxy}, target {self.target})' if self.target else self.msg

    def __repr__(self) -> str:
        cause = '' if self.socket_err is None else f', {self.socket_err!r}'
        where = f', proxy={self.proxy}, target={self.target}' if self.target else ''
        return f'{type(self).__name__}({self.args[0]!r}{cause}{where})'

    def __reduce__(self) -> Tuple[Any, ...]:
        kind, args, state = super().__reduce__()        # whose state lacks errno
        return kind, args, dict(state, errno=self.errno)

    def __setstate__(self, state):
        for name, value in state.items():       # PyPy's __setstate__ does not set errno
            setattr(self, name, value)


class ProxyConnectionError(ProxyError):
    """The proxy itself cannot be reached."""


class GeneralProxyError(ProxyError):
    """An error after the connection to the proxy was made."""


class SOCKS5AuthError(GeneralProxyError):
    """The SOCKS5 proxy accepts none of the methods offered, or refuses the credentials; SOCKS6 too.
    """


class SOCKS5Error(GeneralProxyError):
    """The SOCKS5 or SOCKS6 proxy refused the request."""


class SOCKS4Error(GeneralProxyError):
    """The SOCKS4 proxy refused the request."""


class HTTPError(GeneralProxyError):
    """The HTTP proxy refused the request; `status` is the code of its answer, or None."""
    status: Optional[int] = None


class ProtocolError(GeneralProxyError):
    """A message is malformed, or has a value that is not possible or not supported."""


if sys.version_info >= (3, 10):         # since then, socket.timeout is TimeoutError
    TimedOut = TimeoutError
else:
    class TimedOut(socket.timeout, TimeoutError):
        """A timeout, for programs that catch either class."""


class ProxyTimeoutError(GeneralProxyError, TimedOut):
    """The proxy did not answer in time."""


class ProxyConnectionTimeoutError(ProxyConnectionError, TimedOut):
    """The proxy could not be reached in time."""


# Names before PySocks 1.5, which old programs use.
Socks5AuthError, Socks5Error, Socks4Error = SOCKS5AuthError, SOCKS5Error, SOCKS4Error
_ProxyError = ProxyError


class ClientReset(Exception):
    """The client has reset its connection; raised in its conversation, whatever that waits for."""


class FileError(ValueError):
    """A file has errors, or cannot be read.

    `args` has a text for each error, with its file and line; str() returns the first one.
    """

    def __str__(self):
        first, *more = self.args
        return first + (f' (and {len(more)} more, which --check shows)' if more else '')


class Refused(ProxyError):
    """The server's policy forbids it.

    `address` is the one to send in the reply, for example the peer that BIND turned away; or None.
    """
    reply = Reply.NOT_ALLOWED

    def __init__(self, msg: str, socket_err: Optional[BaseException] = None,
                 reply: Optional[int] = None, address: Optional['Address'] = None) -> None:
        super().__init__(msg, socket_err, reply)
        self.address = address


# RFC 1928 section 6 has fewer codes than systems have errors; GENERAL_FAILURE for the rest.
ERRNO_REPLIES = {
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
    errno.ENETDOWN: Reply.NETWORK_UNREACHABLE,
    errno.EADDRNOTAVAIL: Reply.NETWORK_UNREACHABLE,     # no source address for that network
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    getattr(errno, 'EHOSTDOWN', errno.EHOSTUNREACH): Reply.HOST_UNREACHABLE,
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
    errno.ECONNRESET: Reply.CONNECTION_REFUSED,         # as Dante has it
    errno.ETIMEDOUT: Reply.TTL_EXPIRED,     # there is no code for a timeout; Dante sends this one
    errno.EAFNOSUPPORT: Reply.ADDRESS_TYPE_NOT_SUPPORTED,
}

# The inverse, for connect_ex() and the errno of a `ProxyError`; ECONNABORTED for the rest.
REPLY_ERRNOS = {
    Reply.NOT_ALLOWED: errno.EACCES,
    Reply.NETWORK_UNREACHABLE: errno.ENETUNREACH,
    Reply.HOST_UNREACHABLE: errno.EHOSTUNREACH,
    Reply.CONNECTION_REFUSED: errno.ECONNREFUSED,
    Reply.TTL_EXPIRED: errno.ETIMEDOUT,
    Reply.COMMAND_NOT_SUPPORTED: errno.EOPNOTSUPP,
    Reply.ADDRESS_TYPE_NOT_SUPPORTED: errno.EAFNOSUPPORT,
}

# Errors of getaddrinfo() that mean: the name does not exist, rather than: no name server answered.
NO_SUCH_NAME = {getattr(socket, name) for name in ('EAI_NONAME', 'EAI_NODATA', 'EAI_ADDRFAMILY')
                if hasattr(socket, name)}


def reply_for(error: OSError) -> int:
    """The `Reply` for an OSError on the way to a target; the code itself if a proxy sent one."""
    if isinstance(error, ProxyError):
        return error.reply
    if isinstance(error, socket.timeout):
        return Reply.TTL_EXPIRED
    if isinstance(error, socket.gaierror):          # its errno is an EAI_ number
        return Reply.HOST_UNREACHABLE if error.errno in NO_SUCH_NAME else Reply.GENERAL_FAILURE
    return ERRNO_REPLIES.get(error.errno, Reply.GENERAL_FAILURE)


def is_timeout(error: BaseException) -> bool:
    """Whether `error` is a timeout, of this module or of the system (ETIMEDOUT)."""
    return isinstance(error, (socket.timeout, TimeoutError))


def reason(error: BaseException) -> str:
    """The text of an exception without its errno, for logs."""
    return getattr(error, 'strerror', None) or str(error)


def counted(number: int, noun: str) -> str:
    """The number with the noun, in the plural unless it is 1."""
    return f'{number} {noun}{"s" * (number != 1)}'


# ------------------------------------------------------------------------------------ wire format
#
# Each message is a tuple with pack() -> bytes and unpack(read) -> message.  read(n) returns exactly
# n bytes or raises EOFError, so the same code parses streams and datagrams, however they are split.
# unpack() raises ProtocolError, whose `reply` is the code that a server answers with.
#
# Every length that a peer chooses has a limit, so that it cannot fill the memory.

# Address(host, port) calls a Python function, make(Address, (host, port)) does not: for busy paths.
make = tuple.__new__

MAX_USERID = 512                        # bytes; SOCKS4's strings end with NUL and have no limit
MAX_NAME = 255                          # bytes of a host name; SOCKS5 has one byte for its length
# A name without characters that delimit hosts in a URL or request (URL Standard, section 3.5:
# "forbidden domain code points").
SENDABLE_NAME = re.compile(br'(?=.{1,253}\.?\Z)[^LABEL]{1,63}(\.[^LABEL]{1,63})*\.?\Z'.replace(
    b'LABEL', br'\0- #%./:<>?@[\\\]^|\x7f'))
MAX_LINE, MAX_LINES = 8192, 100         # bytes, and lines, of the head of an HTTP proxy's answer
MAX_HEAD, MAX_FIELDS = 1 << 16, 200     # bytes and fields of a head that is forwarded
MAX_OPTIONS = 20480                     # bytes of the options of a SOCKS6 message
MAX_FIRST_DATA = 1 << 14                # bytes before the authentication of SOCKS6


class Received(io.BytesIO):
    """Bytes to parse."""
    __slots__ = ()

    def read_exact(self, n):
        data = self.read(n)
        if len(data) < n:
            raise EOFError(f'{counted(n, "byte")} expected, {len(data)} left')
        return data


def reader(data: bytes) -> Tuple[Read, Callable[[], bytes]]:
    """Return two functions over `data`: read(n), for unpack(), and one that returns the rest."""
    received = Received(data)
    return received.read_exact, received.read


def read_to(read, end, limit):
    """The bytes up to and including `end`, or `limit` bytes if it is not among them."""
    received = getattr(read, '__self__', None)
    if isinstance(received, Received):  # one search: what trickles in is parsed again and again
        start = received.tell()
        found = received.getvalue().find(end, start, start + limit)
        return read(limit if found < 0 else found + len(end) - start)
    data = b''
    while len(data) < limit and not data.endswith(end):
        data += read(1)
    return data


def expect_version(name, found, expected):
    """Raise ProtocolError unless the version byte is the expected one."""
    if found != expected:
        raise ProtocolError(f'{name} version {found:#04x}, expected {expected:#04x}')


def family_of(host):
    """The address family of an IP address given as text."""
    return socket.AF_INET6 if ':' in host else socket.AF_INET


# One request asks for the same address many times.  The cache is bounded, like all those of this
# module, because clients choose the keys.
@functools.lru_cache(256)
def ip_bytes(host):
    """The 4 or 16 bytes of an IP address given as text; None for any other text.

    A link-local IPv6 address may have a zone, as in fe80::1%eth0 (RFC 4007 section 11).  Local and
    configured addresses have one; canonical() refuses one from a client.
    """
    ip, percent, zone = host.partition('%')
    try:
        packed = socket.inet_pton(family_of(ip), ip)
    except (OSError, ValueError):       # ValueError: NUL or characters outside ASCII
        return None
    return packed if not percent or zone and is_link_local(packed) else None


def is_link_local(packed):
    """Whether the bytes are a link-local IPv6 address, fe80::/10, which is only valid in a zone."""
    return packed[0] == 0xfe and packed[1] & 0xc0 == 0x80 and len(packed) == 16


def ip_text(packed):
    """The text of an IP address given as 4 or 16 bytes."""
    return socket.inet_ntop(socket.AF_INET6 if len(packed) == 16 else socket.AF_INET, packed)


def name_bytes(name):
    """The bytes of a host name, encoded by IDNA (RFC 3490).  Raises ValueError."""
    try:
        return name.encode('ascii')
    except UnicodeEncodeError:
        if len(name) > MAX_NAME:        # the codec takes quadratic time (CVE-2022-45061)
            raise ValueError(f'host name of more than {MAX_NAME} characters') from None
        return name.encode('idna')


@functools.lru_cache(256)
def name_to_send(host):
    """The ASCII form of a name that the user of the client has given.

    It is the one of IDNA 2003, as socket.getaddrinfo() has it.  Raises ProtocolError for a name
    that cannot be sent, or that the request's reader could take for something else.
    """
    try:
        name = name_bytes(host)
    except ValueError:
        name = b''
    if not SENDABLE_NAME.match(name):
        raise ProtocolError(f'host name {printable(host)}, expected labels of 1 to 63 characters, '
                            f'no spaces, controls or delimiters, at most 253 characters')
    return name.decode()


def encoded(value):
    """The bytes of a user name or password given as bytes or str; None stays None."""
    return value.encode() if isinstance(value, str) else value


def is_utf8(data):
    """Whether the bytes are UTF-8."""
    with contextlib.suppress(UnicodeDecodeError):
        data.decode()
        return True
    return False


def name_text(data):
    """Received bytes as text; bytes that are not UTF-8 become surrogates, so that none is lost."""
    return data.decode('utf-8', 'surrogateescape')


# ATYP by the length of an IP address.
ATYP = {4: bytes((AddressType.IPV4,)), 16: bytes((AddressType.IPV6,))}


class Address(NamedTuple):
    """A host, as an IP address or a name, and a port (RFC 1928 section 5)."""
    host: str
    port: int

    @classmethod
    def of(cls, sockaddr: Sequence[Any]) -> 'Address':
        """The `Address` in the address tuple of a socket, without flow label and zone."""
        return make(cls, (sockaddr[0].partition('%')[0], sockaddr[1]))

    @classmethod
    def with_zone(cls, sockaddr: Sequence[Any]) -> 'Address':
        """The same, with the zone of a link-local address, as in fe80::1%eth0 (RFC 4007)."""
        host, port = cls.of(sockaddr)
        if len(sockaddr) == 4 and sockaddr[3]:
            try:
                host = f'{host}%{socket.if_indextoname(sockaddr[3])}'
            except (OSError, AttributeError):   # Windows lacks the function before Python 3.8
                host = f'{host}%{sockaddr[3]}'
        return cls(host, port)

    @property
    def sockaddr(self) -> Tuple[Any, ...]:
        """The address tuple for a socket.  Raises OSError if there is no such zone."""
        _, percent, zone = self.host.partition('%')
        if not percent:
            return self                 # the system completes a tuple of two
        try:
            return _orig_getaddrinfo(self.host, self.port, 0, 0, 0, socket.AI_NUMERICHOST)[0][4]
        except socket.gaierror:
            raise OSError(errno.EADDRNOTAVAIL, f'there is no interface {ascii(zone)}') from None

    def __str__(self) -> str:
        return f'[{self.host}]:{self.port}' if ':' in self.host else f'{self.host}:{self.port}'

    def pack(self) -> bytes:
        """ATYP, ADDR, PORT.  The text of an IP address is sent as an address, not as a name.

        Raises ValueError for a name that cannot be sent.
        """
        packed = None if '%' in self.host else ip_bytes(self.host)
        if packed is None:
            name = name_bytes(self.host)
            if not 0 < len(name) <= MAX_NAME:
                raise ValueError(f'host name of {len(name)} bytes, expected 1 to {MAX_NAME}')
            packed = bytes((AddressType.DOMAINNAME, len(name))) + name
        else:
            packed = ATYP[len(packed)] + packed
        return packed + self.port.to_bytes(2, 'big')

    @classmethod
    def unpack(cls, read: Read) -> 'Address':
        kind = read(1)[0]
        if kind == AddressType.IPV4:
            size, family = 4, socket.AF_INET
        elif kind == AddressType.IPV6:
            size, family = 16, socket.AF_INET6
        elif kind == AddressType.DOMAINNAME:
            size, family = read(1)[0], None
        else:                           # of unknown length: the rest cannot be read
            raise ProtocolError(f'address type {kind:#04x}, expected 0x01, 0x03 or 0x04',
                                reply=Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        data = read(size + 2)
        host, port = data[:size], int.from_bytes(data[size:], 'big')
        return make(cls, (socket.inet_ntop(family, host) if family else name_text(host), port))


UNSPECIFIED = Address('0.0.0.0', 0)


class Greeting(NamedTuple):
    """The client's first message: the methods that it offers (RFC 1928 section 3)."""
    methods: bytes

    def pack(self) -> bytes:
        return bytes((5, len(self.methods))) + bytes(self.methods)

    @classmethod
    def unpack(cls, read: Read) -> 'Greeting':
        version, count = read(2)
        if version != 5:
            expect_version('SOCKS', version, 5)
        return make(cls, (read(count),))


class Choice(NamedTuple):
    """The method that the server selects (RFC 1928 section 3)."""
    method: int

    def pack(self) -> bytes:
        return bytes((5, self.method))

    @classmethod
    def unpack(cls, read: Read) -> 'Choice':
        version, method = read(2)
        expect_version('SOCKS', version, 5)
        return cls(method)


class Credentials(NamedTuple):
    """User name and password, as bytes (RFC 1929 section 2).

    Either may be empty: the RFC asks for one byte at least, but curl and ncat send empty ones.
    """
    username: bytes
    password: bytes

    def pack(self) -> bytes:
        for name, value in zip(self._fields, self):
            if len(value) > 255:
                raise ValueError(f'{name} of {len(value)} bytes, expected at most 255')
        return b''.join((bytes((1, len(self.username))), self.username,
                         bytes((len(self.password),)), self.password))

    def __repr__(self) -> str:
        return '<Credentials>'          # a user name may be a password typed in the wrong place

    @classmethod
    def unpack(cls, read: Read) -> 'Credentials':
        version, length = read(2)
        expect_version('user name/password', version, 1)
        username = read(length)
        return cls(username, read(read(1)[0]))


class Verdict(NamedTuple):
    """The server's answer to `Credentials`: 0 accepts them, any other status refuses them."""
    status: int

    def pack(self) -> bytes:
        return bytes((1, self.status))

    @classmethod
    def unpack(cls, read: Read) -> 'Verdict':
        version, status = read(2)
        if version != 5:                # some servers send the version of SOCKS
            expect_version('user name/password', version, 1)
        return cls(status)


class Request(NamedTuple):
    """A SOCKS5 request (RFC 1928 section 4); `command` may be an unknown number."""
    command: int
    address: Address

    def pack(self) -> bytes:
        return bytes((5, self.command, 0)) + self.address.pack()

    @classmethod
    def unpack(cls, read: Read) -> 'Request':
        version, command, _ = read(3)   # RSV should be 0; real clients send other values
        if version != 5:
            expect_version('SOCKS', version, 5)
        return make(cls, (command, Address.unpack(read)))


class Response(NamedTuple):
    """A SOCKS5 reply (RFC 1928 section 6); `reply` may be an unknown number."""
    reply: int
    address: Address = UNSPECIFIED

    def pack(self) -> bytes:
        return bytes((5, self.reply, 0)) + self.address.pack()

    @classmethod
    def unpack(cls, read: Read) -> 'Response':
        return cls(cls.unpack_reply(read), Address.unpack(read))

    @staticmethod
    def unpack_reply(read: Read) -> int:
        """The reply code alone: some servers send no address after a failure, or a malformed one.
        """
        version, reply, _ = read(3)
        expect_version('SOCKS', version, 5)
        return reply


class Request4(NamedTuple):
    """A SOCKS4 request, or a SOCKS4a request if the host is a name.

    SOCKS4a marks a name, which follows the userid, by an address 0.0.0.x with x other than 0.
    """
    command: int
    address: Address
    userid: bytes = b''

    def pack(self) -> bytes:
        # Proxy.checked() has refused a userid that contains NUL, which would end it here.
        packed, name = ip_bytes(self.address.host), b''
        if packed is None:
            packed, name = b'\0\0\0\1', name_bytes(self.address.host) + b'\0'
        if len(packed) != 4:
            raise ValueError(f'{self.address.host}: SOCKS4 has no IPv6 addresses')
        return b''.join((bytes((4, self.command)), self.address.port.to_bytes(2, 'big'), packed,
                         self.userid, b'\0', name))

    @classmethod
    def unpack(cls, read: Read) -> 'Request4':
        version, command = read(2)
        expect_version('SOCKS', version, 4)
        port, packed = int.from_bytes(read(2), 'big'), read(4)
        userid = cls._string(read, 'userid', MAX_USERID)
        if packed[:3] == b'\0\0\0' and packed[3]:
            host = name_text(cls._string(read, 'host name', MAX_NAME))
        else:
            host = ip_text(packed)
        return cls(command, Address(host, port), userid)

    @staticmethod
    def _string(read, name, limit):
        """The bytes up to the next NUL, at most `limit`."""
        string = read_to(read, b'\0', limit + 1)        # and the NUL
        if not string.endswith(b'\0'):
            raise ProtocolError(f'SOCKS4 {name} of more than {limit} bytes')
        return string[:-1]


class Response4(NamedTuple):
    """A SOCKS4 reply; its address is an IPv4 address."""
    code: int
    address: Address = UNSPECIFIED

    @classmethod
    def of(cls, reply: int, address: Address = UNSPECIFIED) -> 'Response4':
        """The SOCKS4 reply for a `Reply` or `Reply4`; an IPv6 address becomes 0.0.0.0."""
        if ':' in address.host:
            address = Address(UNSPECIFIED.host, address.port)
        if not isinstance(reply, Reply4):
            reply = Reply4.GRANTED if reply == Reply.SUCCEEDED else Reply4.REJECTED
        return cls(reply, address)

    def pack(self) -> bytes:
        return (bytes((0, self.code)) + self.address.port.to_bytes(2, 'big')
                + socket.inet_aton(self.address.host))

    @classmethod
    def unpack(cls, read: Read) -> 'Response4':
        version, code = read(2)
        if version != 4:                # some servers send 4 instead of 0
            expect_version('SOCKS4 reply', version, 0)
        port = int.from_bytes(read(2), 'big')
        return cls(code, Address(ip_text(read(4)), port))


# SOCKS6: draft-olteanu-intarea-socks-6-11, and the changes of its authors since then.
#
# Theory of operation.  A client sends all at once: a request, with its credentials in an option,
# and the first data.  Two replies follow, to the credentials (`Verdict6`) and to the request
# (`Response6`), or only the first one if it is a refusal.  Every message begins with the version, a
# code, and a length.  The parts of an address have another order than in SOCKS5, and a name is
# padded, so they are rearranged for and by `Address`.

def address_to_6(packed):
    """(ATYP, PORT, ADDR), as a number and bytes, for the bytes of Address.pack().

    A name is padded with NUL to a multiple of 4 bytes with its length, which counts the padding.
    """
    kind, host, port = packed[0], packed[1:-2], packed[-2:]
    if kind == AddressType.DOMAINNAME:
        name = host[1:] + bytes(-len(host) % 4)
        host = bytes((len(name),)) + name
    return kind, port, host


def address_from_6(kind, port, read):
    """The inverse, where ADDR is read; the length of a name need not count the padding."""
    sizes = {AddressType.IPV4: 4, AddressType.IPV6: 16, AddressType.DOMAINNAME: 1}
    host = read(sizes.get(kind, 0))
    if kind == AddressType.DOMAINNAME:
        name = read(host[0] + -(host[0] + 1) % 4)[:host[0]].rstrip(b'\0')
        host = b'%c%b' % (len(name), name)
    return b'%c%b%b' % (kind, host, port)


def unpack_head_6(read):
    """(code, length) at the beginning of a message."""
    version, code = read(2)             # read first: another protocol's answer may be short
    expect_version('SOCKS', version, 6)
    return code, int.from_bytes(read(2), 'big')


class Option(NamedTuple):
    """An option of a message; `data` is padded with zeros to a multiple of 4 bytes.

    The kinds that are not ignored: options of IP and TCP; the size of first data, and the methods
    offered; the method chosen; a method, and its message.
    """
    kind: int
    data: bytes

    STACK, METHODS, METHOD, AUTHENTICATION = 1, 2, 3, 4

    def __repr__(self) -> str:
        return f'<Option {self.kind}, {len(self.data)} bytes>'          # it may be a password

    @classmethod
    def of(cls, message: 'Union[Credentials, Verdict]') -> 'Option':
        """The option for a message of RFC 1929."""
        data = bytes((Method.USERNAME_PASSWORD,)) + message.pack()
        return cls(cls.AUTHENTICATION, data + bytes(-len(data) % 4))

    @staticmethod
    def pack_all(options):
        return b''.join(struct.pack('!HH', kind, 4 + len(data)) + data for kind, data in options)

    @classmethod
    def unpack_all(cls, read, size):
        """Parse a message's options, which take `size` bytes."""
        if size > MAX_OPTIONS or size % 4:
            raise ProtocolError(f'SOCKS6 options of {size} bytes, expected a multiple of 4, at '
                                f'most {MAX_OPTIONS}')
        options, (read, _) = [], reader(read(size))
        while size:
            kind, length = struct.unpack('!HH', read(4))
            if length < 4 or length % 4 or length > size:
                raise ProtocolError(f'SOCKS6 option {kind} of {length} bytes, expected a multiple '
                                    f'of 4, from 4 to {size}')
            options.append(cls(kind, read(length - 4)))
            size -= length
        return tuple(options)


class Verdict6(NamedTuple):
    """An authentication reply: 0 for success, any other status for a failure."""
    status: int
    options: Tuple[Option, ...] = ()

    def pack(self) -> bytes:
        options = Option.pack_all(self.options)
        return struct.pack('!BBH', 6, self.status, len(options)) + options

    @classmethod
    def unpack(cls, read: Read) -> 'Verdict6':
        status, size = unpack_head_6(read)
        return cls(status, Option.unpack_all(read, size))


class _Fields6(NamedTuple):
    code: int
    address: Address = UNSPECIFIED
    options: Tuple[Option, ...] = ()


class Response6(_Fields6):
    """An operation reply; `reply` may be an unknown number."""
    reply = _Fields6.code

    def pack(self) -> bytes:
        options = Option.pack_all(self.options)
        kind, port, host = address_to_6(self.address.pack())
        return struct.pack('!BBH2sxB', 6, self.code, len(options), port, kind) + host + options

    @classmethod
    def unpack(cls, read: Read) -> 'Response6':
        code, size = unpack_head_6(read)
        port, _, kind = struct.unpack('!2sBB', read(4))
        address = Address.unpack(reader(address_from_6(kind, port, read))[0])
        return cls(code, address, Option.unpack_all(read, size))


class Request6(Response6):
    """A request, which has the same form; `command` may be an unknown number."""
    command = _Fields6.code

    def option(self, kind: int, start: bytes = b'') -> Optional[Option]:
        """The option of a kind whose data begins with `start`, or None."""
        found = [each for each in self.options
                 if each.kind == kind and each.data.startswith(start)]
        if len(found) > 1:
            raise ProtocolError(f'{len(found)} SOCKS6 options of kind {kind}, expected one')
        return found[0] if found else None

    def credentials(self) -> Optional[Credentials]:
        """The user name and password in the options, or None."""
        found = self.option(Option.AUTHENTICATION, bytes((Method.USERNAME_PASSWORD,)))
        if not found:
            return None
        with contextlib.suppress(EOFError):
            credentials = Credentials.unpack(reader(found.data[1:])[0])
            if Option.of(credentials) == found:
                return credentials
        raise ProtocolError('SOCKS6 user name and password: expected to fill the option, with at '
                            'most 3 bytes of padding')

    def methods(self) -> Tuple[bytes, int]:
        """The methods offered, and the number of bytes of first data that precede those of the
        method, if it is not "no authentication"."""
        _, data = self.option(Option.METHODS) or (None, b'\0\0')
        size = int.from_bytes(data[:2], 'big')
        if not data or size > MAX_FIRST_DATA:
            raise ProtocolError(f'SOCKS6 first data of {size} bytes, expected at most '
                                f'{MAX_FIRST_DATA}')
        return data[2:], size if self.command == Command.CONNECT else 0

    def stack_options(self) -> Dict[int, int]:
        """{code: value} of the options of IP for the way from the proxy to the target."""
        return {data[1]: data[2] for kind, data in self.options
                if kind == Option.STACK and len(data) == 4 and data[0] & 0xBF == 0x81}


class Message6(NamedTuple):
    """A message of an association, in its TCP connection or over UDP.

    `association` is its identifier, 8 bytes.  `datagram` has the header of SOCKS5, as in
    `StreamedDatagram`; it is empty if the message is of another kind, or malformed.
    """
    kind: int
    association: bytes
    datagram: bytes = b''

    BEGUN, CONFIRMED, DATAGRAM = 1, 2, 3

    def pack(self) -> bytes:
        body = b''
        if self.kind == self.DATAGRAM:
            end = header_end(self.datagram, len(self.datagram))
            kind, port, host = address_to_6(self.datagram[3:end])
            body = b'%c\0%b%b%b' % (kind, port, host, self.datagram[end:])
        if len(body) > 0xFFFF - 12:
            raise ValueError(f'datagram of {len(body)} bytes, expected at most {0xFFFF - 12}')
        return struct.pack('!BBH8s', 6, self.kind, 12 + len(body), self.association) + body

    @classmethod
    def unpack(cls, read: Read) -> 'Message6':
        kind, size = unpack_head_6(read)
        if size < 12:
            raise ProtocolError(f'SOCKS6 message of {size} bytes, expected at least 12')
        association, body, datagram = read(8), read(size - 12), b''
        if kind == cls.DATAGRAM:
            read, rest = reader(body)
            with contextlib.suppress(EOFError):
                atyp, _, port = struct.unpack('!BB2s', read(4))
                datagram = b'\0\0\0%b%b' % (address_from_6(atyp, port, read), rest())
        is_whole = header_end(datagram, len(datagram)) <= len(datagram)
        return cls(kind, association, datagram if is_whole else b'')


class Form6(NamedTuple):
    """The form of the messages of one association, for the same use as `StreamedDatagram`."""
    association: bytes

    def __call__(self, datagram):
        """The message for a datagram; for an empty one, the confirmation of the first one."""
        kind = Message6.DATAGRAM if datagram else Message6.CONFIRMED
        return Message6(kind, self.association, bytes(datagram))

    def unpack(self, read):
        """The next message; without its datagram if it is of another association."""
        message = Message6.unpack(read)
        is_ours = message.association == self.association
        return message if is_ours else message._replace(datagram=b'')

    def datagram_in(self, data):
        """The datagram of a message that came over UDP; b'' if it has none, or is malformed."""
        with contextlib.suppress(EOFError, ProtocolError):
            return self.unpack(reader(data)[0]).datagram
        return b''


class Datagram(NamedTuple):
    """A UDP datagram with its header between client and relay (RFC 1928 section 7)."""
    address: Address
    payload: bytes
    fragment: int = 0

    def pack(self) -> bytes:
        return b'\0\0%c%b%b' % (self.fragment, self.address.pack(), self.payload)

    @classmethod
    def unpack(cls, data: bytes) -> 'Datagram':
        """Parse a whole datagram.  Raises EOFError if its header is incomplete."""
        read, rest = reader(data)
        fragment = read(3)[2]           # RSV should be 0; real clients send other values
        return cls(Address.unpack(read), rest(), fragment)


def header_end(data, count):
    """The length of the header of a UDP datagram of `count` bytes (RFC 1928 section 7); more than
    `count` if it is malformed."""
    if count > 4:
        kind = data[3]
        if kind == AddressType.IPV4:
            return 10
        if kind == AddressType.DOMAINNAME:
            return 7 + data[4]
        if kind == AddressType.IPV6:
            return 22
    return count + 1


@functools.lru_cache(1024)
def udp_header(address):
    """The header of datagrams to or from `address`, not fragments."""
    return Datagram(address, b'').pack()


class StreamedDatagram(NamedTuple):
    """A datagram as a message in a TCP connection, after the command UDP_IN_TCP.

    The message is DATLEN(2), HDRLEN(1), ATYP, ADDR, PORT, DATA, as in hev-socks5-server.  DATLEN is
    the length of DATA, HDRLEN of all before it.  `datagram` is the same as over UDP, where three
    other bytes precede ATYP: RSV and FRAG, which are 0.
    """
    datagram: bytes

    def pack(self) -> bytes:
        end = header_end(self.datagram, len(self.datagram))
        size = len(self.datagram) - end
        if end > 0xFF or size > 0xFFFF:
            raise ValueError(f'header of {end} bytes, data of {size} bytes, expected at most 255 '
                             f'and 65535')
        return struct.pack('!HB', size, end) + self.datagram[3:]

    @classmethod
    def unpack(cls, read: Read) -> 'StreamedDatagram':
        size, end = struct.unpack('!HB', read(3))
        start = b'\0\0\0' + read(2)     # with ATYP and the length of a name
        expected = header_end(start, 5)
        if expected == 6:
            raise ProtocolError(f'address type {start[3]:#04x}, expected 0x01, 0x03 or 0x04',
                                reply=Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        if end != expected:
            raise ProtocolError(f'HDRLEN {end}, expected {expected}')
        return cls(start + read(end - 5 + size))


class _GssFields(NamedTuple):
    kind: int
    token: bytes = b''


class GssMessage(_GssFields):           # type checkers let no NamedTuple have constants of its own
    """A message of the GSSAPI negotiation, or a protected one (RFC 1961 sections 3 to 5)."""
    __slots__ = ()

    TOKEN, LEVEL, DATA, ABORT = 1, 2, 3, 0xFF
    LARGEST = 0xFFFF                    # bytes of a token

    def pack(self) -> bytes:
        if self.kind == self.ABORT:
            return bytes((1, self.kind))
        return struct.pack('!BBH', 1, self.kind, len(self.token)) + self.token

    @classmethod
    def unpack(cls, read: Read) -> 'GssMessage':
        version, kind = read(2)
        expect_version('GSSAPI', version, 1)
        if kind == cls.ABORT:
            return cls(kind)
        return cls(kind, read(int.from_bytes(read(2), 'big')))

    @classmethod
    def unpack_token(cls, kind: int, read: Read) -> bytes:
        """The token of a message.  Raises ProtocolError if the message is of another kind."""
        message = cls.unpack(read)
        if message.kind != kind:
            raise ProtocolError(f'GSSAPI message {message.kind:#04x}, expected {kind:#04x}')
        return message.token


class HttpConnect(NamedTuple):
    """The request for a tunnel that a client sends to an HTTP proxy (RFC 9110 section 9.3.6)."""
    address: Address
    credentials: bytes = b''            # NAME:PASSWORD (RFC 7617 section 2), or empty

    def __repr__(self) -> str:
        secret = ' with credentials' if self.credentials else ''
        return f'<HttpConnect {self.address}{secret}>'

    def pack(self) -> bytes:
        host = (self.address.host if ip_bytes(self.address.host)
                else name_bytes(self.address.host).decode())
        where = str(Address(host, self.address.port)).encode()
        lines = [b'CONNECT %b HTTP/1.1' % where, b'Host: ' + where]
        if self.credentials:
            lines.append(b'Proxy-Authorization: Basic '
                         + b2a_base64(self.credentials, newline=False))
        return b'\r\n'.join(lines) + b'\r\n\r\n'


class HttpStatus(NamedTuple):
    """The status line of an HTTP proxy's answer (RFC 9112 section 4)."""
    code: int
    phrase: str

    @classmethod
    def unpack(cls, read: Read) -> 'HttpStatus':
        line = http_line(read)
        # The phrase, and the space before it, are missing in the answers of some proxies; so is the
        # minor version, as HTTP/2 has none.
        match = re.match(r'HTTP/[0-9](?:\.[0-9])? ([0-9]{3})(?: (.*))?$', line.decode('latin-1'))
        if not match:
            raise ProtocolError(f'{line[:40]!r}, expected the status line of an HTTP proxy')
        return cls(int(match.group(1)), match.group(2) or '')


class HttpHead(NamedTuple):
    """The start line and the fields of an HTTP message (RFC 9112 sections 2 to 5).

    They are text in Latin-1, which has one character for each byte.
    """
    start: str
    fields: Tuple[Tuple[str, str], ...] = ()

    END = re.compile(rb'\n\r?\n')
    # RFC 9112 section 5.1: white space before the colon is an error, as it means different names to
    # different parsers.
    FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\0-\x08\n-\x1f\x7f]*)")
    ANY_FIELD = re.compile(r'([^\s:]+)[ \t]*:([^\n]*)')
    STATUS = re.compile(r'HTTP/1[.][0-9] [1-9][0-9][0-9]( [^\r]*)?')
    LONGEST = 1024                      # characters of a list that is split into its members
    # Fields that are for the next hop only (RFC 9110 section 7.6.1).  Transfer-Encoding and Trailer
    # are not among them, because bodies are passed on as they are.
    HOP_BY_HOP = {'connection', 'keep-alive', 'proxy-authenticate', 'proxy-authentication-info',
                  'proxy-authorization', 'proxy-connection', 'te', 'upgrade'}
    # A client must not have these removed by naming them in Connection: the target would see
    # another request than the one that was judged here.
    FRAMING = {'host', 'content-length', 'transfer-encoding'}

    def pack(self):
        lines = [self.start, *map('%s: %s'.__mod__, self.fields)]
        return '\r\n'.join([*lines, '\r\n']).encode('latin-1')

    @classmethod
    def unpack(cls, data):
        """Parse a whole head.

        Raises ProtocolError if another parser might read it differently (RFC 9112 sections 2.2 and
        5), which is how requests are smuggled.
        """
        # A bare LF or CR stays within a line, where FIELD does not match it.
        start, *lines = data.decode('latin-1')[:-4].split('\r\n')
        if len(lines) > MAX_FIELDS:
            raise ProtocolError(f'{len(lines)} HTTP fields, expected at most {MAX_FIELDS}',
                                reply=HttpCode.HEAD_TOO_LARGE)
        matches = [cls.FIELD.fullmatch(line) for line in lines]
        if None in matches or not data.endswith(b'\r\n\r\n'):     # not quoted: it may be secret
            place = f'field {matches.index(None) + 1}' if None in matches else 'head'
            raise ProtocolError(f'HTTP {place} is malformed', reply=HttpCode.BAD_REQUEST)
        return cls(start, tuple((name, value.strip(' \t'))
                                for name, value in (match.groups() for match in matches)))

    @classmethod
    def unpack_answer(cls, data):
        """Parse the head of a target's answer.  Raises ProtocolError if it is not HTTP.

        Many servers are old or careless, so folded lines are joined (RFC 9112 section 5.2) and
        malformed fields left out.
        """
        if data.count(b'\n') > 2 * MAX_FIELDS:          # parsing more takes milliseconds
            raise ProtocolError(f'HTTP head of more than {2 * MAX_FIELDS} lines')
        text = re.sub('\r?\n[ \t]+', ' ', data.decode('latin-1')).replace('\0', ' ')
        start, *lines = re.split('\r?\n', text.rstrip('\r\n'))
        if not cls.STATUS.fullmatch(start):
            raise ProtocolError(f'{start[:40]!r}, expected the status line of an HTTP server')
        if len(lines) > MAX_FIELDS:
            raise ProtocolError(f'{len(lines)} HTTP fields, expected at most {MAX_FIELDS}')
        matches = (cls.ANY_FIELD.fullmatch(line.replace('\r', ' ')) for line in lines)
        return cls(start, tuple((name, value.strip(' \t'))
                                for name, value in (match.groups() for match in matches if match)))

    def values(self, name):
        """The values of all fields with this name, given in lower case."""
        return [value for field, value in self.fields if field.lower() == name]

    def words(self, name):
        """The members of the comma-separated lists in these fields, in lower case."""
        text = ','.join(self.values(name)).lower()
        if len(text) > self.LONGEST:
            raise ProtocolError(f'HTTP {name} of more than {self.LONGEST} characters',
                                reply=HttpCode.HEAD_TOO_LARGE)
        # strip() alone would remove more than HTTP's white space (RFC 9110 section 5.6.3).
        words = (word.strip(' \t') for word in text.split(','))
        return [word for word in words if word]

    def end_to_end(self, *without):
        """The fields to pass on to the other side, except those named in `without`."""
        dropped = self.HOP_BY_HOP | (set(self.words('connection')) - self.FRAMING) | set(without)
        return tuple(field for field in self.fields if field[0].lower() not in dropped)


class HttpRequest(NamedTuple):
    """A client's request to an HTTP proxy (RFC 9112 section 3): CONNECT, or one to forward."""
    method: str
    address: Address
    path: str                           # to send to the target; empty for CONNECT
    minor: str                          # minor version: 0 for HTTP/1.0, 1 for HTTP/1.1
    length: Optional[int]               # bytes of the body; None if it is chunked
    head: HttpHead

    LINE = re.compile(r'([^ ]+) ([^\0-\x20\x7f]+) HTTP/([0-9])[.]([0-9])')
    METHOD = re.compile(r'[A-Z][A-Z0-9_-]{0,31}')
    URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)')
    # An empty port is the usual one (RFC 3986 section 3.2.3).
    HOST_AND_PORT = re.compile(r'(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@\\]+))(?::([0-9]{0,5}))?')

    def __repr__(self):
        return f'HTTP {self.method} {self.address!r}'       # path and fields may be secret

    @property
    def command(self):
        return Command.CONNECT if self.method == 'CONNECT' else Command.FORWARD

    @classmethod
    def unpack(cls, data):
        """Parse a whole head.  Raises ProtocolError, whose `reply` is an `HttpCode`."""
        head = HttpHead.unpack(data)
        match = cls.LINE.fullmatch(head.start)
        if not match:
            raise cls._error('HTTP request line, expected METHOD TARGET HTTP/1.1')
        method, target, major, minor = match.groups()
        if major != '1':
            raise cls._error(f'HTTP/{major}.{minor}, expected 1.1', HttpCode.VERSION_NOT_SUPPORTED)
        if not cls.METHOD.fullmatch(method):
            raise cls._error(f'HTTP method {method[:40]!r}', HttpCode.NOT_IMPLEMENTED)
        if len(head.values('host')) > 1:        # RFC 9112 section 3.2 demands the refusal
            raise cls._error('HTTP with more than one Host, expected one')
        length = cls._length(head, minor)
        if method == 'CONNECT':
            if length != 0:             # would its bytes be the body, or the tunnel's first?
                raise cls._error('HTTP CONNECT with a body, expected none')
            return cls(method, cls._address(target, ''), '', minor, 0, head)
        # With Max-Forwards: 0 they are for the proxy (RFC 9110 section 7.6.2).
        if method in ('OPTIONS', 'TRACE') and not all(
                value.strip('0') for value in head.values('max-forwards')):
            raise cls._error(f'HTTP {method} for this proxy itself, expected one to forward',
                             HttpCode.NOT_IMPLEMENTED)
        url = cls.URL.match(target)
        if not url:
            raise cls._error('HTTP for this proxy itself, expected CONNECT or a whole URL')
        scheme, authority, path = url.groups()
        if scheme.lower() != 'http':
            raise cls._error(f'HTTP for {scheme[:40]}:, expected http: or CONNECT',
                             HttpCode.NOT_IMPLEMENTED)
        # A user and password in the URL are neither for the proxy nor passed on, as in browsers.
        address = cls._address(authority.rpartition('@')[2], '80')
        if method == 'OPTIONS' and not path:    # RFC 9112 section 3.2.4
            path = '*'
        elif not path.startswith('/'):
            path = '/' + path
        return cls(method, address, path, minor, length, head)

    @staticmethod
    def _error(text, code=HttpCode.BAD_REQUEST):
        return ProtocolError(text, reply=code)

    @classmethod
    def _length(cls, head, minor):
        """The length of the body; None if it is chunked.

        Raises ProtocolError if the length can be read in two ways (RFC 9112 section 6.3).
        """
        lengths, codings = head.values('content-length'), head.words('transfer-encoding')
        if head.values('transfer-encoding'):
            # The last test is for empty fields, which words() leaves out but a target may not.
            if (lengths or minor == '0' or codings[-1:] != ['chunked'] or 'chunked' in codings[:-1]
                    or not all(head.values('transfer-encoding'))):
                raise cls._error('HTTP Transfer-Encoding: expected chunked at its end, once, '
                                 'and no Content-Length')
            return None
        # int() would also take "+5", "5_0" and digits of other scripts.
        if len(lengths) > 1 or lengths and not re.fullmatch('[0-9]{1,18}', lengths[0]):
            raise cls._error('HTTP Content-Length: expected one number')
        return int(lengths[0]) if lengths else 0

    @classmethod
    def _address(cls, authority, usual_port):
        """The `Address` in HOST[:PORT].  Raises ProtocolError."""
        match = cls.HOST_AND_PORT.fullmatch(authority)
        shown_as = authority.rpartition('@')[2][:40]        # what precedes may be a password
        port = match and (match.group(3) or usual_port)
        if not port or not 0 < int(port) < 65536:
            raise cls._error(f'HTTP to {shown_as!r}, expected a host, and a port up to 65535')
        host = name_text((match.group(1) or match.group(2)).encode('latin-1'))
        try:
            # The length first: to encode 255 characters can take 15 ms.
            if (len(match.group(1) or match.group(2)) > MAX_NAME
                    or match.group(1) and len(ip_bytes(host) or b'') != 16):
                raise ValueError
            idna_bytes(host)
        except ValueError:
            raise cls._error(f'HTTP to {shown_as!r}, expected a host name, or an IPv6 address in '
                             f'brackets') from None
        return Address(host, int(port))

    @property
    def credentials(self):
        """The `Credentials` for this proxy (RFC 7617), or None if there are none that can be read.
        """
        given = self.head.values('proxy-authorization')
        # Two times 255 bytes and a colon are 682 characters of base64.
        match = len(given) == 1 and re.fullmatch('(?i)basic +([a-z0-9+/]{1,700})=*', given[0])
        try:
            # Some clients leave the padding out; too much of it is ignored.
            pair = a2b_base64(match.group(1) + '==') if match else b''
        except ValueError:
            pair = b''
        name, colon, password = pair.partition(b':')
        return Credentials(name, password) if colon else None

    @property
    def upgrade(self):
        """The protocols that the client offers to switch to (RFC 9110 section 7.8), '' for none.

        With HTTP/2 among them none is offered to the target: it could carry requests for other
        hosts.
        """
        wanted = self.head.words('upgrade') if 'upgrade' in self.head.words('connection') else []
        is_possible = self.minor != '0' and wanted and 'h2c' not in wanted
        return ', '.join(self.head.values('upgrade')) if is_possible else ''

    def forwarded(self):
        """The `HttpHead` to send to the target.

        Host is that of the URL (RFC 9112 section 3.2.2); Connection says that no other request will
        follow.
        """
        host, port = name_bytes(self.address.host).decode(), self.address.port
        where = str(Address(host, port))
        fields = [('Host', where[:-3] if port == 80 else where)]       # without ":80"
        for name, value in self.head.end_to_end('host'):
            # RFC 9110 section 7.6.2: one less at each proxy
            if name.lower() == 'max-forwards' and re.fullmatch('[0-9]{1,9}', value):
                value = str(max(0, int(value) - 1))
            fields.append((name, value))
        fields.append(('Via', f'1.{self.minor} socks.py'))
        fields.append(('Connection', 'Upgrade' if self.upgrade else 'close'))
        if self.upgrade:
            fields.append(('Upgrade', self.upgrade))
        return HttpHead(f'{self.method} {self.path} HTTP/1.{self.minor}', tuple(fields))


class HttpBody:
    """Finds the end of a request's body in the bytes that arrive (RFC 9112 sections 6 and 7).

    length   bytes of the body; None if it is chunked

    Theory of operation.  A chunked body is lines and counted bytes in turn: the size of a chunk,
    its bytes, ..., a size of 0, the fields of the trailer, an empty line.  `left` counts down the
    bytes of a chunk; at 0 comes a line, collected in `_line` until `_pattern` matches.
    """
    LONGEST = 4096                      # bytes of a line
    # The line end that closes one chunk is matched with the size of the next.
    CHUNK = re.compile(rb'\r\n([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\0-\x08\n-\x1f\x7f]*)?\r\n')
    TRAILER = re.compile(b'(?:%b)?\r\n' % HttpHead.FIELD.pattern.encode())

    def __init__(self, length):
        self.left = length or 0         # bytes up to the next line, or to the end
        # The part of a line that has arrived; None after the last line, and if the length is known.
        self._line = b'\r\n' if length is None else None
        self._pattern = self.CHUNK
        self._trailers = 0              # fields of the trailer

    def take(self, data):
        """The number of bytes at the start of `data` that belong to the body.

        Raises ProtocolError if the body is malformed.
        """
        taken = 0
        while taken < len(data):
            step = min(self.left, len(data) - taken)
            self.left -= step
            taken += step
            if self.left or self._line is None:        # the data, or the body, is at its end
                break
            taken += self._take_line(bytes(data[taken:taken + self.LONGEST]))
        return taken

    def _take_line(self, data):
        """The number of bytes at the start of `data` that belong to the line under way."""
        text, is_chunk = self._line + data, self._pattern is self.CHUNK
        match = self._pattern.match(text)
        if match:
            used = match.end() - len(self._line)
            self._line = b''
            if is_chunk:
                self.left = int(match.group(1), 16)
                if not self.left:
                    self._pattern = self.TRAILER
            elif match.group() == b'\r\n':
                self._line = None
            else:
                self._trailers += 1
                if self._trailers > MAX_FIELDS:
                    raise ProtocolError(f'HTTP trailer of more than {MAX_FIELDS} fields',
                                        reply=HttpCode.BAD_REQUEST)
            return used
        # Incomplete, or wrong?  Each line is parsed again from its start, hence the limit.  A line
        # end inside means that it is complete, so that the pattern should have matched; a CR may
        # be the last byte so far.
        begun = text[2:] if is_chunk else text
        if (len(text) > self.LONGEST or b'\n' in begun or b'\r' in begun[:-1]
                or is_chunk and not b'\r\n'.startswith(text[:2])):
            raise ProtocolError('HTTP chunk or trailer is malformed', reply=HttpCode.BAD_REQUEST)
        self._line = text
        return len(data)


class HttpAnswer(NamedTuple):
    """The proxy's own answer to an HTTP request; empty without a code, when the target answers."""
    code: Optional[HttpCode]
    text: str = ''
    has_body: bool = True               # False for the answer to HEAD (RFC 9110 section 9.3.2)

    def pack(self):
        if self.code is None:
            return b''
        start = f'HTTP/1.1 {self.code:d} {self.code.text}'
        if self.code == HttpCode.OK:    # without any length: RFC 9110 section 9.3.6
            return HttpHead(start).pack()
        body = f'{self.text}\n'.encode('utf-8', 'backslashreplace')
        fields = [('Content-Type', 'text/plain; charset=utf-8'),
                  ('Content-Length', str(len(body))), ('Connection', 'close')]
        if self.code == HttpCode.LOGIN_REQUIRED:
            fields.append(('Proxy-Authenticate', 'Basic realm="socks.py", charset="UTF-8"'))
        return HttpHead(start, tuple(fields)).pack() + body * self.has_body


def text_line(read, limit, name):
    """The next line as bytes, without its end.  Raises ProtocolError beyond `limit` bytes."""
    line = read_to(read, b'\n', limit)
    if not line.endswith(b'\n'):
        raise ProtocolError(f'{name} of more than {limit} bytes')
    return line.rstrip(b'\r\n')


def http_line(read):
    return text_line(read, MAX_LINE, 'an HTTP line')


PROXY_SIGNATURE = b'\r\n\r\n\0\r\nQUIT\n'
PROXY_FORMATS = {0x11: 4, 0x21: 16}     # TCP over IPv4, over IPv6: the bytes of an address


class ProxyHeader(NamedTuple):
    """The header that a load balancer sends before a connection that it forwards: PROXY protocol,
    versions 1 and 2 (HAProxy's proxy-protocol.txt, section 2).

    Both addresses are None for connections of its own, for example health checks (LOCAL, UNKNOWN).
    """
    source: Optional[Address] = None
    destination: Optional[Address] = None

    def pack(self) -> bytes:
        """The header in version 2."""
        if not self.source:
            return PROXY_SIGNATURE + b'\x20\0\0\0'
        hosts = ip_bytes(self.source.host) + ip_bytes(self.destination.host)
        ports = struct.pack('!HH', self.source.port, self.destination.port)
        kind = 0x11 if len(hosts) == 8 else 0x21
        return PROXY_SIGNATURE + struct.pack('!BBH', 0x21, kind, len(hosts) + 4) + hosts + ports

    @classmethod
    def unpack(cls, read: Read) -> 'ProxyHeader':
        first = read(1)
        if first == b'P':
            # 107 bytes at most, says section 2.1.
            return cls._unpack_text(b'P' + text_line(read, 106, 'a PROXY line'))
        if first != b'\r' or first + read(11) != PROXY_SIGNATURE:
            raise ProtocolError('expected a PROXY header, which --proxy-protocol demands of this '
                                'address')
        version, kind, length = struct.unpack('!BBH', read(4))
        if version not in (0x20, 0x21):         # LOCAL, PROXY
            raise ProtocolError(f'PROXY version and command {version:#04x}, expected 0x20 or 0x21')
        data, size = read(length), PROXY_FORMATS.get(kind)      # addresses, then TLVs: not used
        # Without addresses of IP, the balancer's own stands for the client's.
        if version == 0x20 or size is None:
            return cls()
        if length < 2 * size + 4:
            raise ProtocolError(f'PROXY addresses of {length} bytes, expected {2 * size + 4}')
        source, destination = struct.unpack('!HH', data[2 * size:2 * size + 4])
        return cls(Address(ip_text(data[:size]), source),
                   Address(ip_text(data[size:2 * size]), destination))

    @classmethod
    def _unpack_text(cls, line):
        """Parse version 1, a line."""
        if re.match(b'PROXY UNKNOWN( |$)', line):
            return cls()
        match = re.fullmatch('PROXY TCP([46]) ([^ %]+) ([^ %]+) ([0-9]{1,5}) ([0-9]{1,5})',
                             line.decode('latin-1'))
        version, *words = match.groups() if match else ' '
        ends = [Address(host, int(port)) for host, port in zip(words[:2], words[2:])]
        size = 16 if version == '6' else 4
        if not ends or any(len(ip_bytes(host) or b'') != size or port > 65535
                           for host, port in ends):
            raise ProtocolError(f'PROXY line {line!r}, expected TCP4 or TCP6, two addresses and '
                                f'two ports')
        return cls(*ends)


class IdentQuery(NamedTuple):
    """Asks which user has the connection between two ports (RFC 1413 section 4)."""
    port_on_server: int                 # at the host that is asked
    port_on_client: int                 # at this host

    def pack(self) -> bytes:
        return b'%d , %d\r\n' % self


class IdentReply(NamedTuple):
    """The answer: the user, or None if the host does not say or the system is OTHER."""
    userid: Optional[bytes]

    @classmethod
    def unpack(cls, read: Read) -> 'IdentReply':
        # RFC 1413 section 6: "feel free to abort" after 1000 characters.  The userid may itself
        # contain colons.
        fields = [field.strip(b' \t')
                  for field in text_line(read, 1000, 'an ident reply').split(b':', 3)]
        known = (len(fields) == 4 and fields[1] == b'USERID'
                 and fields[2].partition(b',')[0] != b'OTHER')
        return cls(fields[3] if known else None)


# ---------------------------------------------------------------------------------------- sockets

# If all attempts to connect fail, the error that says most about the target is raised.
ERROR_RANKS = {reply: rank for rank, reply in enumerate((
    Reply.CONNECTION_REFUSED, Reply.HOST_UNREACHABLE, Reply.NETWORK_UNREACHABLE,
    Reply.TTL_EXPIRED))}
BLOCKED = (BlockingIOError, InterruptedError)
# For socket(): a stream socket that does not block, where the system can make one at once.
SOCK_NONBLOCK = getattr(socket, 'SOCK_NONBLOCK', 0)
NEW_STREAM = socket.SOCK_STREAM | SOCK_NONBLOCK
CONNECTED = {0, errno.EISCONN}          # of connect_ex()
UNDER_WAY = {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK}
ATTEMPT_DELAY = 0.25                    # seconds between attempts (RFC 8305 section 8)
ATTEMPTS = 16                           # addresses of one name that are tried
thread_time = getattr(time, 'thread_time', time.perf_counter)      # thread_time is new in 3.7
ATTEMPT_TIMEOUT = 10.0                  # seconds for one of several addresses, tried one by one
LONGEST = 86400.0                       # seconds to wait at once; poll(2) takes 24 days at most
# ip(7): connect(), not bind(), chooses the port, so that connections to different targets share it.
IP_BIND_ADDRESS_NO_PORT = 24            # from linux/in.h; the socket module lacks the name
RESET = struct.pack('ii', 1, 0)         # SO_LINGER on, 0 seconds: close() sends RST, socket(7)
LOOPBACK6 = bytes(15) + b'\1'
RECEIVE_BUFFER = 1 << 22                # bytes; a burst of datagrams beyond it is lost
SO_RCVBUFFORCE = 33                     # socket(7): beyond the system's limit, for root
UDP_SEGMENT = 103                       # udp(7): the size of datagrams in what one call sends
IP_FAMILIES = socket.AF_INET, socket.AF_INET6
V4_MAPPED = b'\0' * 10 + b'\xff\xff'
# Not an error of a client or target: this process has used up descriptors or memory.
NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
NEVER_RESOLVED = ('invalid', 'onion')   # RFC 6761 section 6.4, RFC 7686 section 2
LOOPBACK_NAME = re.compile(             # RFC 6761 section 6.3, and names in usual /etc/hosts files
    r'(.*\.)?(localhost[46]?|ip6-localhost|ip6-loopback)(\.localdomain[46]?)?$')
NAME = re.compile(br'(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\Z')
FULL_STOPS = ('.', '\u3002', '\uff0e', '\uff61')         # separate labels (RFC 3490 section 3.1)
# UTS #46, deviations: IDNA 2003 maps these (sharp s, final sigma, ZWNJ, ZWJ), IDNA 2008 keeps them.
DEVIATIONS = set('\u00df\u1e9e\u03c2\u200c\u200d')


@functools.lru_cache(256)
def plain_ip(host):
    """An IP address in its usual spelling, a v4-mapped one as IPv4; None for an address with a
    zone, and for any other text."""
    packed = ip_bytes(host)
    if packed is None or '%' in host:
        return None
    return ip_text(packed[12:] if packed[:12] == V4_MAPPED else packed)


def in_zone_of(local, host):
    """The IP address `host`; a link-local one gets the zone of `local`, this end of the connection.
    """
    zone = local.partition('%')[1:]
    return host + ''.join(zone) if is_link_local(ip_bytes(host)) else host


@functools.lru_cache(4096)
def client_key(host):
    """The key of a client for limits: an IPv4 address, or the /64 network of an IPv6 address.

    A host usually has a whole /64 to itself, and could use a new address for each connection.
    """
    packed = ip_bytes(host)
    return host if packed is None or len(packed) == 4 else packed[:8]


def without_brackets(host):
    """An IPv6 address without the brackets around it; any other text unchanged."""
    return host[1:-1] if host.startswith('[') and host.endswith(']') and ':' in host else host


def idna_bytes(host):
    """The ASCII form of a name.  Raises ValueError if IDNA 2003 and IDNA 2008 disagree on it.

    They agree on letters, marks and digits that both map in the same way (RFC 5892 section 2,
    UTS #46).  With any other character, a rule on the name could mean another host than the one
    that is connected to.
    """
    with contextlib.suppress(UnicodeEncodeError):       # most names are ASCII
        return host.encode('ascii').lower()
    # Twice, because casefold() can undo a normalization (Unicode section 3.13).
    mapped = unicodedata.normalize('NFKC', unicodedata.normalize('NFKC', host).casefold())
    labels = mapped.replace('\u3002', '.').split('.')
    # The length first, since the codec takes quadratic time (CVE-2022-45061).  A label that is not
    # ASCII grows by "xn--".
    size = sum(len(label) + (5 if max(label + '.') > '\x7f' else 1) for label in labels)
    if (size > MAX_NAME or max(map(len, labels)) > 63 or not DEVIATIONS.isdisjoint(host)
            or not all(char <= '\x7f' or char in FULL_STOPS or unicodedata.category(char)[0] in 'LM'
                       or unicodedata.category(char) == 'Nd' for char in host)):
        raise ValueError('too long, or without a form in IDNA 2008')
    name = host.encode('idna')
    if name.decode('idna').lower() != '.'.join(labels):
        raise ValueError('two forms')
    return name.lower()


@functools.lru_cache(256)
def canonical(address):
    """`address` in the form that rules and the log use.

    The text of an IP address becomes an address in its usual spelling: many clients send one as a
    name, IPv6 also in brackets.  A name becomes lower-case ASCII without its final dot.  Raises
    ProtocolError for any other text: a name has letters, digits, hyphens and underscores, in labels
    of at most 63.
    """
    host, port = address
    ip = plain_ip(without_brackets(host))
    if ip:
        return Address(ip, port)
    try:
        name = idna_bytes(host)
    except ValueError:
        raise ProtocolError(f'host name {printable(host)}, expected one with a single form in '
                            f'ASCII') from None
    name = name[:-1] if name.endswith(b'.') else name
    if not NAME.match(name):
        raise ProtocolError(f'host name {printable(host)}, expected labels of 1 to 63 letters, '
                            f'digits, - and _, at most 253 characters')
    if name.rpartition(b'.')[2][:1].isdigit():  # resolvers read 127.1 and 0x7f000001 as addresses
        with contextlib.suppress(OSError):      # but not a.1b, which is a name
            return Address(socket.inet_ntoa(socket.inet_aton(name.decode())), port)
    return Address(name.decode(), port)


@functools.lru_cache(256)
def absolute(address):
    """`address` in the form to look up: canonical(), but a name keeps its final dot.

    The dot makes the name absolute: resolvers do not append the domains of a search list.
    """
    host, port = plain = canonical(address)
    is_name = ip_bytes(host) is None
    return Address(host + '.', port) if is_name and address.host.endswith(FULL_STOPS) else plain


is_word = re.compile('[!-~]+').fullmatch
is_plain = re.compile('[ -~]*').fullmatch


def printable(text):
    """Untrusted text, escaped to stay one word of a log line.

    The result is ASCII: other characters can look like spaces, or like ASCII letters.
    """
    return text if is_word(text) else ascii(text)


def printable_line(text):
    """Untrusted text, escaped to stay one line of ASCII, without control characters of terminals.
    """
    return text if is_plain(text) else text.encode('unicode_escape').decode('ascii')


class UnixAddress(Address):
    """The address of a unix socket: its path in the log, 127.0.0.1 and port 0 for rules."""

    def __new__(cls, path):
        address = super().__new__(cls, '127.0.0.1', 0)
        address.path = path
        return address

    def __str__(self):
        return f'unix:{printable(os.fsdecode(self.path))}'


def local_address(sock):
    """The `Address` of this end of a socket, with the zone of a link-local one."""
    sockaddr = sock.getsockname()
    if not isinstance(sockaddr, tuple):
        return UnixAddress(sockaddr)
    host, port = Address.with_zone(sockaddr)
    return Address(plain_ip(host) or host, port)


# Everything that takes time is a conversation: a generator that yields what it waits for (a `Wait`
# for sockets, a `Call` that blocks, the `LookUp` of a name) and is resumed with the result.  It
# reads from top to bottom like code that blocks.  run() drives one in the calling thread, a `Loop`
# any number of them.  All times named `until` are those of time.monotonic().

class Wait(NamedTuple):
    """Wait until a socket is ready; the result is the ready ones, or none after `until`.

    No socket may be in both lists.
    """
    reading: Sequence = ()
    writing: Sequence = ()
    until: Optional[float] = None


class Worker(enum.Enum):
    """The thread in which a `Call` runs."""
    POOL = 'one of the pool'
    COSTLY = 'one of the pool, few at a time: for CPU-bound functions'
    OWN = 'a new one: for functions that may block for any time'


class Call(NamedTuple):
    """Call function() in another thread; the result is what it returns or raises.

    Raises socket.timeout after `until`; the function still runs to its end then.
    """
    function: Callable
    until: Optional[float] = None
    worker: Worker = Worker.POOL


class LookUp(NamedTuple):
    """Look a name up; the result is a list of IP addresses as texts, at least one.

    Raises socket.gaierror if there is none, socket.timeout after `until`.  A `Loop` asks its
    `Resolver`; run() calls function().
    """
    name: str
    until: Optional[float] = None

    def function(self) -> List[str]:
        return hosts_of(self.name)


def run(conversation: Generator[Any, Any, Result]) -> Result:
    """Drive a conversation in the calling thread and return its result.

    What blocks, blocks this thread; a `Call` is not ended by its `until`.
    """
    advance, value = conversation.send, None
    with contextlib.closing(conversation):      # at once, if KeyboardInterrupt is raised here
        while True:
            try:
                awaited = advance(value)
            except StopIteration as stop:
                return stop.value
            finally:
                value = None            # breaks the cycle: error, traceback, this frame
            try:
                value = poll(*awaited) if isinstance(awaited, Wait) else awaited.function()
                advance = conversation.send
            except Exception as error:
                advance, value = conversation.throw, error


def poll(reading, writing, until):
    """Do what a `Wait` asks for, in the calling thread; a list or set of the ready sockets."""
    seconds = until and min(LONGEST, max(0, until - time.monotonic()))
    if not hasattr(select, 'poll'):     # Windows, where a failed connect is "exceptional"
        return set().union(*select.select(reading, writing, writing, seconds))
    poller = select.poll()
    for sock in reading:
        poller.register(sock, select.POLLIN)
    for sock in writing:
        poller.register(sock, select.POLLOUT)
    # Rounded up: a wait that ends a little early would be repeated many times.
    found = {fd for fd, _ in poller.poll(seconds if seconds is None else int(seconds * 1000) + 1)}
    return [sock for sock in (*reading, *writing) if sock.fileno() in found]


def deadline(seconds):
    """The time `seconds` from now, for `until`; None, which is never, for 0 or None."""
    return time.monotonic() + seconds if seconds else None


def wait_ready(reading, writing, until, pause=None):
    """Conversation: the sockets that are ready, or none after `pause` seconds.

    Raises socket.timeout after `until`.
    """
    limit = until
    if pause is not None:
        limit = min(deadline(pause), until or float('inf'))
    found = yield Wait(reading, writing, limit)
    if until and time.monotonic() >= until:     # even if a peer keeps a socket ready all the time
        raise socket.timeout('timed out')
    return found


class VirtualAddresses:
    """IP addresses that stand for names which only the proxy looks up, for programs that ask for
    the address of a name before they connect.  Thread-safe.

    A name has an IPv4 address of 198.18.0.0/15 (RFC 2544) and the IPv6 address of 100::/64
    (RFC 6666) that ends with it.  No host on the Internet has an address of these networks.

    The SIZE names that were used last are remembered.  The address of a forgotten name is an error,
    and is given to another name only after all others: a program may have stored it.  An address
    that was never given to a name is a real one: other software uses these networks, too.

    is_on   whether programs get such addresses
    """
    SIZE = 1 << 15
    FIRST, COUNT = 0xc6120000, 1 << 17  # 198.18.0.0/15
    IPV6_PREFIX = b'\1' + bytes(11)

    def __init__(self):
        self.is_on = False
        self._numbers = OrderedDict()   # name: number of its address, the one used last at the end
        self._names = {}    # number of an address, counted from FIRST: name, None if forgotten
        self._origins = OrderedDict()   # real address: name, see remember()
        self.after_fork()

    def after_fork(self):
        """Make a new lock, since another thread may have held it, and start at a random address, so
        that parent and child do not give the same address to different names."""
        self._lock = threading.Lock()
        self._last = int.from_bytes(os.urandom(4), 'big') % self.COUNT

    def of(self, name, family=socket.AF_INET):
        """The virtual address of a name, as text; a new one if it has none."""
        with self._lock:
            number = self._numbers.get(name)
            if number is None:
                if len(self._numbers) >= self.SIZE:
                    self._names[self._numbers.popitem(last=False)[1]] = None
                number = self._unused()
                self._names[number] = name
                self._numbers[name] = number
            self._numbers.move_to_end(name)
        packed = (self.FIRST + number).to_bytes(4, 'big')
        return ip_text(self.IPV6_PREFIX + packed if family == socket.AF_INET6 else packed)

    def _unused(self):
        """The number of the next free address, in turn."""
        while True:
            self._last = (self._last + 1) % self.COUNT
            # Some programs take .0 for the address of a network and .255 for broadcast.
            if self._names.get(self._last) is None and self._last % 256 not in (0, 255):
                return self._last

    def name(self, host):
        """The name that `host` stands for; None if it is not a virtual address.

        Raises GeneralProxyError for the address of a forgotten name.
        """
        number = self.number(host) if self._names else None
        with self._lock:
            if number not in self._names:
                return None
            name = self._names[number]
            if name is not None:
                self._numbers.move_to_end(name)
                return name
        error = GeneralProxyError(
            f'{host} stands for no name, expected one of the {self.SIZE} used last')
        error.errno = errno.EHOSTUNREACH
        raise error

    def number(self, host):
        """The number of a virtual address, -1 for the other addresses of 100::/64; None for any
        other host."""
        packed = ip_bytes(host.partition('%')[0]) or b''
        others = -1 if len(packed) == 16 and packed[:8] == self.IPV6_PREFIX[:8] else None
        if packed[:12] in (V4_MAPPED, self.IPV6_PREFIX):
            packed = packed[12:]
        number = int.from_bytes(packed, 'big') - self.FIRST
        return number if len(packed) == 4 and 0 <= number < self.COUNT else others

    def knows(self, name):
        """Whether `name` has a virtual address."""
        return name in self._numbers

    def remember(self, host, name):
        """Note that a real IP address was found for `name`."""
        host = plain_ip(host) or host
        with self._lock:
            self._origins[host] = name
            self._origins.move_to_end(host)
            if len(self._origins) > self.SIZE:
                self._origins.popitem(last=False)

    def forget_origins(self):
        self._origins.clear()

    def origin(self, host):
        """The name that a real IP address was found for, or None."""
        return self._origins and self._origins.get(plain_ip(host) or host) or None


virtual_addresses = VirtualAddresses()
if hasattr(os, 'register_at_fork'):     # not on Windows, nor before Python 3.7
    os.register_at_fork(after_in_child=virtual_addresses.after_fork)


def stock(function):
    """The original of a resolver function of `socket`, if wrap_module() has replaced it; any other
    function unchanged."""
    return getattr(function, '__dict__', {}).get('stock', function)    # a mock has any attribute


def need_descriptor():
    """Raise OSError if this process can open no further file."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if error.errno in NO_ROOM:
            raise


def look_up(host, port, family=0):
    """socket.getaddrinfo() for TCP, as the program has replaced it, if it has.

    If the result is not IP addresses, or virtual ones, the original function is asked: some
    replacements return the name itself, for a proxy to look up.
    """
    try:
        found = stock(socket.getaddrinfo)(host, port, family, socket.SOCK_STREAM)
    except socket.gaierror:             # a resolver that can open no file says "unknown name"
        need_descriptor()
        raise
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME,
                              f'{printable(host)} is not a host name') from None
    hosts = [str(sockaddr[0]).partition('%')[0] for *_, sockaddr in found[:ATTEMPTS]]
    if any(plain_ip(host) is None or virtual_addresses.number(host) is not None for host in hosts):
        found = _orig_getaddrinfo(host, port, family, socket.SOCK_STREAM)
    return found


def hosts_of(name, family=0):
    """The IP addresses of a name, looked up in the calling thread: at most ATTEMPTS texts.

    Raises socket.gaierror if there is none.
    """
    families = {}
    # As bytes: a str would go through the codec "idna", which is slow, though it is ASCII already.
    for *_, sockaddr in look_up(name.encode(), 0, family):
        host = str(sockaddr[0]).partition('%')[0]
        hosts = families.setdefault(family_of(host), {})
        if len(hosts) < ATTEMPTS:       # a name can have thousands
            hosts[plain_ip(host)] = True
    hosts = in_turn(*families.values())[:ATTEMPTS]
    if not hosts:
        raise socket.gaierror(socket.EAI_NONAME, f'{name} has no address')
    return hosts


def in_turn(*families):
    """Merge lists into one: their first items, then their second ones, and so on."""
    turns = itertools.zip_longest(*families)
    return [item for turn in turns for item in turn if item]


def resolve(address, until=None):
    """Conversation: the IP addresses of `address`, a list of at least one `Address`.

    A name with a final dot is absolute.  Raises ProtocolError for a host that is neither name nor
    address, socket.gaierror if there is no address, socket.timeout after `until`.
    """
    host, port = wanted = absolute(address)
    if ip_bytes(host) is not None:
        return [wanted]
    if host.rstrip('.').rpartition('.')[2] in NEVER_RESOLVED:
        raise socket.gaierror(socket.EAI_NONAME, f'{host} is never resolved')
    return [Address(host, port) for host in (yield LookUp(host, until))]


class Stream:
    """Reads and writes messages over a non-blocking socket, or a `Layer`.

    until     when its conversations raise socket.timeout
    waits     the socket to wait for, if it is not `sock` itself: the one below a layer
    surplus   bytes that were read but belong to no message yet: the next message, or the first
              bytes of the tunnel
    """
    SIZE = 4096                         # bytes to read at a time; any handshake fits in
    LARGEST = 1 << 16                   # bytes of surplus; the rest stays in the socket
    GONE = 'the client left'

    surplus = b''
    _must_wait = False                  # recv() would block: the peer has a message to answer first

    def __init__(self, sock, until, waits=None):
        self.sock = sock
        self.waits = waits or sock
        self.until = until

    @staticmethod
    def lost(error):
        """The exception to raise for an error of the socket: EOFError, as if the peer had left.

        An OSError would be taken for an error on the way to the target.
        """
        return EOFError(reason(error))

    def _receive(self, flags=0):
        """Conversation: the next bytes.  Raises EOFError at the end."""
        while True:
            if self._must_wait:         # as wait_ready() does, which would take three calls
                yield make(Wait, ((self.waits,), (), self.until))
                if self.until and time.monotonic() >= self.until:
                    raise socket.timeout('timed out')
            try:
                data = self.sock.recv(self.SIZE, flags)
                break
            except BLOCKED:
                self._must_wait = True
            except OSError as error:
                raise self.lost(error) from None
        self._must_wait = False
        if not data:
            raise EOFError(self.GONE)
        return data

    def read(self, unpack):
        """Conversation: the message that unpack(read) returns for the next bytes.

        Raises EOFError if the peer leaves before its end, socket.timeout after `until`.
        """
        # A message may come byte by byte, or with the next ones.  `surplus` stays small until then,
        # because unpack() raises an error when a length in the message is beyond its limit.
        while True:
            if self.surplus:
                received = Received(self.surplus)       # as reader() does
                try:
                    message = unpack(received.read_exact)
                    self.surplus = received.read()
                    return message
                except EOFError:        # incomplete: parse it again with what comes next
                    pass
            self.surplus += yield from self._receive()

    def read_head(self):
        """Conversation: the bytes of the head of an HTTP request, including the empty line.

        Raises ProtocolError if its first line is not one of HTTP, or if it is longer than MAX_HEAD.
        """
        # Each byte is searched once (from `start`), since a large head may come in small pieces.
        data, start, has_line = bytearray(self.surplus), 0, False
        while True:
            end = HttpHead.END.search(data, max(0, start - 2))
            if (end.end() if end else len(data)) > MAX_HEAD:
                raise ProtocolError(f'HTTP head of more than {MAX_HEAD} bytes',
                                    reply=HttpCode.HEAD_TOO_LARGE)
            if not has_line and data.find(b'\n', start) >= 0:
                has_line = re.match(b'[^\n]+ HTTP/[0-9][.][0-9]\r\n', data)
                if not has_line:        # answer at once: other protocols may wait for that
                    raise ProtocolError(f'{bytes(data[:8])!r}, expected SOCKS or HTTP',
                                        reply=HttpCode.BAD_REQUEST)
            if end:
                self.surplus = bytes(data[end.end():])
                return bytes(data[:end.end()])
            start = len(data)
            data += yield from self._receive()

    def look(self):
        """Conversation: some of the next bytes, which also stay in the socket."""
        return self._receive(socket.MSG_PEEK)

    def peek(self):
        """Conversation: the next byte, as a number; it is not consumed."""
        if not self.surplus:
            self.surplus = yield from self._receive()
        return self.surplus[0]

    def wait_for(self, sockets, until):
        """Conversation: wait until one of the other sockets is readable.

        Meanwhile read what the peer sends, up to LARGEST, to notice when it leaves.  Raises
        EOFError then, socket.timeout after `until`.
        """
        while True:
            own = [self.waits] if len(self.surplus) < self.LARGEST else []
            found = yield from wait_ready([*sockets, *own], (), until)
            if self.waits not in found:
                return
            try:
                data = self.sock.recv(self.SIZE)
            except BLOCKED:             # only a part of a layer's message has arrived
                continue
            except OSError as error:
                raise self.lost(error) from None
            if not data:
                raise EOFError(self.GONE)
            self.surplus += data

    def write(self, message):
        """Conversation: send all of a message."""
        data = message.pack()
        while data:
            try:
                data = data[self.sock.send(data):]
            except BLOCKED:
                yield from wait_ready((), [self.waits], self.until)
            except OSError as error:
                raise self.lost(error) from None
        self._must_wait = True

    def linger(self, until):
        """Conversation: end this side's direction, and wait until the peer ends or `until`.

        close() with unread bytes would send RST (RFC 1122 section 4.2.2.13), and a peer that gets
        RST loses what it has not read yet: the last message.
        """
        with contextlib.suppress(OSError):      # the peer has reset the connection, or `until`
            self.sock.shutdown(socket.SHUT_WR)
            data = True
            while data:
                yield from wait_ready([self.waits], (), until)
                with contextlib.suppress(*BLOCKED):     # a part of a layer's message has arrived
                    data = self.sock.recv(self.SIZE)


class ExactStream(Stream):
    """A stream that leaves in the socket the bytes after a message, so there is never a surplus.

    For the client: the socket goes to a program, which must get all that follows the last reply.
    """
    GONE = 'Connection closed unexpectedly'

    def lost(self, error):
        fault = getattr(self.sock, 'fault', None)       # of a `PlainEnd`
        return OSError(error.errno, fault) if fault else error

    def read(self, unpack):
        # Two system calls for a message that is there.  To read what is missing step by step would
        # need one for each field of a message, and one for each byte of a line.
        while True:
            seen = yield from self.look()
            with contextlib.suppress(EOFError):
                return self.take(unpack, seen)

    def take(self, unpack, seen, stays=False):
        """The message that unpack(read) returns for the next bytes, `seen` in the socket; its bytes
        are consumed, unless it `stays`.

        Raises EOFError if it is incomplete.
        """
        read, rest = reader(self.surplus + seen)
        try:                            # parse first, then consume exactly that much
            message, left = unpack(read), len(rest())
        except EOFError:
            # Consume these, or the socket would stay readable although nothing new has come.
            self.surplus += self.sock.recv(len(seen))
            raise
        if not stays:
            self.sock.recv(len(seen) - left)
            self.surplus = b''
        return message


class Layer:
    """Encryption, or HTTP, over a non-blocking socket, which it owns; it has as much of a socket's
    interface as a relay needs.

    A subclass has recv_into(), and _seal(data), which adds to _cipher what stands for the first
    bytes of `data` and returns their number.

    Theory of operation.  Reading: recv_into() leaves no decrypted bytes behind, so that there is
    something to read if and only if the socket below is readable.  Writing: three things may wait
    for the socket below.

    - The ciphertext of a send().  It cannot be unmade, so send() raises BlockingIOError until the
      socket has taken all of it.  The caller keeps the plaintext, waits until the socket is
      writable, and calls send() with the same bytes again; `_plain` is their number.
    - Messages of the protocol itself (in TLS, the answer to a change of keys).  They go out with
      the next send or read.  A peer that causes more and more of them, but does not read, is cut
      off at LARGEST.
    - The end of the direction.  After shutdown() there is no further send(), so `unsent` tells the
      owner to call flush() when the socket is writable.

    An error of the socket ends all three: waiting bytes are dropped, and `unsent` is false.  They
    count in `held` of the loop that has the layer.
    """
    RECORD = 1 << 15                    # more than the bytes of one record
    LARGEST = 1 << 19                   # bytes that may wait for the socket
    failure = None                      # outcome for the log, where the relay's would be less exact
    fault = None                        # text of an error of TLS, such as the peer's alert

    def __init__(self, sock):
        self._sock = sock
        self._cipher = b''              # bytes that wait for the socket
        self._plain = 0                 # number of plaintext bytes of the send() under way
        self._ending = False            # shutdown() when the socket has taken all
        self._loop = None               # the loop whose `held` includes the waiting bytes
        self._counted = 0               # how many of them it includes
        self.fileno = sock.fileno
        self.getsockopt, self.setsockopt = sock.getsockopt, sock.setsockopt
        self.getsockname = sock.getsockname

    def count_in(self, loop):
        """Count waiting bytes in `loop` from now on, or in none if it is None."""
        if isinstance(self._sock, Layer):
            self._sock.count_in(loop)
        if self._loop:
            self._loop.held -= self._counted
        self._loop, self._counted = loop, 0
        self._count()

    def _count(self):
        if self._loop:
            self._loop.held += len(self._cipher) - self._counted
            self._counted = len(self._cipher)

    def flush(self):
        """Send waiting bytes; return whether the socket has taken all."""
        try:
            with contextlib.suppress(*BLOCKED):         # the rest waits in `_cipher`
                while self._cipher:
                    self._cipher = self._cipher[self._sock.send(self._cipher):]
            if self._ending and not self._cipher:
                self._ending = False
                self._sock.shutdown(socket.SHUT_WR)
            elif getattr(self._sock, 'unsent', False):      # a layer below has bytes of its own
                self._sock.flush()
        except OSError:
            self._cipher, self._ending = b'', False
            raise
        finally:
            self._count()
        return not self._cipher

    @property
    def unsent(self):
        """Whether flush() must be called when the socket is writable, since no send() will."""
        return self._ending or getattr(self._sock, 'unsent', False)

    def recv(self, size, _=0):
        """As of a socket, but the result may be longer than `size`."""
        buffer = bytearray(size + 2 * self.RECORD)
        return bytes(buffer[:self.recv_into(buffer, size)])

    def send(self, data):
        """Send the first bytes and return their number.

        After BlockingIOError, it must be called with the same bytes again.
        """
        if not self._plain:
            self._plain = self._seal(data[:1 << 18])        # a bound on what may wait
        if not self.flush():
            raise BlockingIOError(errno.EAGAIN, 'the socket is full')
        sent, self._plain = self._plain, 0
        return sent

    def shutdown(self, _):
        """End this side's direction; the other one goes on."""
        self._ending = True
        self.flush()

    def close(self):
        with contextlib.suppress(OSError):      # the peer may be gone
            self.flush()
        self._sock.close()


class TlsLayer(Layer):
    """TLS over a socket or another layer.

    It works on memory (ssl.MemoryBIO) rather than on the socket: an SSLSocket could not end one
    direction and go on reading.
    """
    QUICK = 0.001                       # seconds that a step of a handshake may take in a loop
    UNASKED = 1 << 12                   # bytes of answers without data from the peer in between
    # Bytes to give to TLS at a time: FAST if at least half of the last ones were data.  One KiB can
    # hold forty changes of keys, which take over a millisecond.
    CAREFUL, FAST = 1 << 10, 1 << 14
    FRUITLESS = 1 << 16                 # bytes without data in between, which end the connection
    costly = weakref.WeakSet()          # server contexts whose steps take longer than QUICK: RSA

    def __init__(self, sock, context, **options):
        import ssl                      # here, since it is large and often not needed
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = ssl
        self._context = context
        self._tls = context.wrap_bio(self._incoming, self._outgoing, **options)
        self._fresh = b''               # received, but not given to TLS
        self._given = 1                 # number of bytes that TLS was given last
        self._data = 0                  # number of bytes of data that they contained
        self._unasked = 0               # bytes of answers since the last data
        self._fruitless = 0             # bytes given since then
        self._ended = False             # the socket is at its end
        self._failure = None            # error of a send while reading, raised after the last data

    def handshake(self, until):
        """Conversation: agree on keys.

        Raises ssl.SSLError if that fails, EOFError if the peer leaves, socket.timeout after
        `until`.
        """
        while True:
            if self._context in self.costly:
                done, error = yield Call(self._advance, until, Worker.COSTLY)
            else:
                done, error = self._advance()
            if error:
                with contextlib.suppress(OSError):
                    self.flush()        # the alert that tells the peer
                raise error
            while not self.flush():
                yield from wait_ready((), [self._sock], until)
            if done:
                return
            yield from wait_ready([self._sock], (), until)
            with contextlib.suppress(*BLOCKED):     # select(2): readiness may be spurious
                self._fetch(4 * self.CAREFUL)       # a bound on the time of one step
                self._incoming.write(self._fresh)
                self._fresh = b''
            if self._ended:
                raise EOFError('Connection closed in the TLS handshake')

    def _advance(self):
        """Take a step of the handshake; return whether it was the last, and its error or None.

        It may run in a thread of the pool when the conversation has timed out and closed the layer,
        so it touches nothing but TLS, and raises nothing.
        """
        done, failure, started = False, None, thread_time()
        try:
            self._tls.do_handshake()
            done = True
        except self._ssl.SSLWantReadError:
            pass
        except Exception as error:
            failure = error
            # ssl.CertificateError, up to Python 3.6.
            if isinstance(error, ValueError) and not isinstance(error, OSError):
                failure = self._ssl.SSLError(self._ssl.SSL_ERROR_SSL, str(error))
            self._forget_error()
        if self._tls.server_side and thread_time() - started > self.QUICK:
            self.costly.add(self._context)
        return done, failure

    def peer_certificate(self):
        """The peer's certificate, as SSLSocket.getpeercert() returns it; {} if it sent none."""
        return self._tls.getpeercert() or {}

    def flush(self):
        self._cipher += self._outgoing.read()       # with the messages of the protocol itself
        return super().flush()

    def _fetch(self, size):
        """Receive ciphertext."""
        self._fresh = self._sock.recv(size)
        self._ended = not self._fresh

    def _feed(self):
        """Give the next bytes of ciphertext to TLS."""
        size = self.FAST if 2 * self._data >= self._given else self.CAREFUL
        self._given, self._data = self._incoming.write(self._fresh[:size]), 0
        self._fruitless += self._given
        self._fresh = memoryview(self._fresh)[size:]

    def _answer(self):
        """Send messages of the protocol itself.  Raises OSError if a peer causes too many."""
        self._unasked += self._outgoing.pending
        try:
            self.flush()
        except OSError as error:        # a peer that takes no more may still have sent data
            self._failure = self._failure or error
        if self._unasked > self.UNASKED or len(self._cipher) > self.LARGEST:
            raise OSError(errno.ENOBUFS, 'TLS: the peer causes answers without end')
        if self._fruitless > self.FRUITLESS:
            raise OSError(errno.ENOBUFS, 'TLS: the peer changes keys without end')

    def recv_into(self, buffer, size):
        """Read at most `size` bytes of the socket, and all that they decrypt to; return its length.

        `buffer` has room for `size` bytes and a RECORD.  0 is the end of the peer's direction.
        """
        buffer, count, has_fetched = memoryview(buffer), 0, False
        while not self._ended:
            more = self._decrypt(buffer[count:])
            if more:
                count += more
                continue
            if more == 0:
                break
            self._answer()
            if self._fresh:
                self._feed()
            elif count:
                return count
            elif has_fetched:
                raise BlockingIOError(errno.EAGAIN, 'a part of a TLS record')
            else:
                if 2 * self._data < self._given:        # the rest has to wait for its turn
                    size = min(size, self.CAREFUL)
                self._fetch(min(size, len(buffer) - self.RECORD))
                has_fetched = True
        # At the end of the socket, MemoryBIO is not told: that would end both directions.  A reset
        # that a send has reported is not reported again; only the end is.
        if self._ended and isinstance(self._failure, ConnectionResetError):
            raise self._failure
        # TLS's own end may come before that of the socket, which must be readable for recv_into()
        # to be called again and return 0.
        with contextlib.suppress(OSError):      # the peer has reset it
            self._sock.shutdown(socket.SHUT_RD)
        return count

    def _decrypt(self, buffer):
        """Decrypt into `buffer`; the number of bytes, 0 at TLS's own end, None without a record."""
        try:
            count = self._tls.read(len(buffer), buffer)
        except self._ssl.SSLWantReadError:
            return None
        except self._ssl.SSLZeroReturnError:
            return 0
        except self._ssl.SSLError as error:
            self.fault = reason(error)
            self._forget_error()
            raise
        if count:
            self._data += count
            self._unasked = self._fruitless = 0
        return count

    def _seal(self, data):
        try:
            return self._tls.write(data)
        except self._ssl.SSLError:
            self._forget_error()
            raise

    def _unwrap(self):
        """Send close_notify, which ends this direction; the peer need not answer (RFC 8446 6.1)."""
        try:
            self._tls.unwrap()
        except self._ssl.SSLWantReadError:
            pass
        except self._ssl.SSLError:
            self._forget_error()
            raise

    def _forget_error(self):
        """Clear OpenSSL's queue of errors of this thread, where PyPy leaves an error that the next
        call, of any connection, would raise.  Making an object clears it."""
        if sys.implementation.name == 'pypy':
            is_server = self._tls.server_side
            self._context.wrap_bio(self._ssl.MemoryBIO(), self._ssl.MemoryBIO(), is_server,
                                   None if is_server else 'x')

    def shutdown(self, how):
        self._unwrap()
        super().shutdown(how)

    def close(self):
        """Send close_notify if the socket takes it, so that the end looks intended, and close."""
        with contextlib.suppress(OSError):      # there was no handshake, or it has failed
            self._unwrap()
        super().close()


def below_layers(sock):
    """The socket below all layers, `sock` itself if it is none."""
    while isinstance(sock, Layer):
        sock = sock._sock
    return sock


def abort(sock):
    """Close a socket, or the one below a layer, by RST, so that its end does not look regular."""
    sock = below_layers(sock)
    with contextlib.suppress(OSError):          # it is closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


@contextlib.contextmanager
def owned(*sockets):
    """Context manager: close the sockets if the block fails; else they belong to its result."""
    try:
        yield
    except BaseException:               # GeneratorExit, too: a conversation that is ended
        for sock in sockets:
            sock.close()
        raise


class GssError(OSError):
    """An error that the GSSAPI library reports, with its text."""


class GssLibrary:
    """The functions of GSSAPI (RFC 2743; C bindings: RFC 2744) that are used here, by ctypes.

    Raises OSError if MIT Kerberos is not installed.  Calls may block, to ask a KDC.
    """
    NAME = 'libgssapi_krb5.so.2'        # MIT Kerberos; other libraries have other structures
    KERBEROS = bytes.fromhex('2a864886f712010202')              # RFC 1964 section 1
    SERVICE_NAME = bytes.fromhex('2a864886f71201020104')        # SERVICE@HOST (RFC 2743 4.1)
    MUTUAL, REPLAY, SEQUENCE, CONF, INTEG = 2, 4, 8, 16, 32     # flags of a context
    FOREVER, ACCEPT, FAILED = 0xFFFFFFFF, 2, 0xFFFF0000         # FAILED: bits of a status

    def __init__(self):
        if sys.platform != 'linux':
            raise OSError(errno.ENOSYS, 'GSSAPI: only supported on Linux')
        import ctypes                   # here, since it is seldom needed
        self.handle, self.number, self.reference = ctypes.c_void_p, ctypes.c_uint32, ctypes.byref
        self._c = ctypes

        class Buffer(ctypes.Structure):
            _fields_ = [('length', ctypes.c_size_t), ('value', ctypes.POINTER(ctypes.c_char))]

        class Oid(ctypes.Structure):
            _fields_ = [('length', ctypes.c_uint32), ('elements', ctypes.c_char_p)]

        self._buffer_class, self._oid_class = Buffer, Oid
        try:
            self._library = ctypes.CDLL(self.NAME)
        except OSError:
            raise OSError(errno.ENOENT, f'GSSAPI: {self.NAME} is not installed') from None

    def call(self, name, *args):
        """Call gss_NAME(&minor, *args) and return its status.  Raises GssError."""
        minor = self.number()
        function = getattr(self._library, 'gss_' + name)
        function.restype = self.number
        status = function(self.reference(minor), *args)
        if status & self.FAILED:
            texts = filter(None, (self._text(status, 1), self._text(minor.value, 2)))
            raise GssError(errno.EACCES, 'GSSAPI: ' + '; '.join(texts))
        return status

    def _text(self, status, kind):
        """The text of a status code; `kind` 1 is GSSAPI's, 2 the mechanism's."""
        text, more, minor = self.output(), self.number(), self.number()
        self._library.gss_display_status(self.reference(minor), self.number(status), kind, None,
                                         self.reference(more), text)
        return self.taken(text).decode('utf-8', 'replace') if status else ''

    def input(self, data):
        """A pointer to a gss_buffer_desc with the bytes of `data`."""
        value = self._c.cast(self._c.c_char_p(data), self._c.POINTER(self._c.c_char))
        return self._c.pointer(self._buffer_class(len(data), value))

    def output(self):
        """A pointer to an empty gss_buffer_desc, for a call to fill and taken() to read."""
        return self._c.pointer(self._buffer_class())

    def taken(self, output):
        """The bytes that a call has put into `output`; releases the memory."""
        buffer, minor = output.contents, self.number()
        data = self._c.string_at(buffer.value, buffer.length) if buffer.length else b''
        self._library.gss_release_buffer(self.reference(minor), output)
        return data

    def oid(self, data):
        """A pointer to a gss_OID_desc."""
        return self._c.pointer(self._oid_class(len(data), data))

    def imported(self, name):
        """The handle of a name, SERVICE@HOST, or a principal with a slash.  Raises GssError."""
        handle = self.handle()
        self.call('import_name', self.input(name.encode()),
                  None if '/' in name else self.oid(self.SERVICE_NAME), self.reference(handle))
        return handle

    @contextlib.contextmanager
    def keys(self):
        """Context manager: the handle of all keys in the keytab.  Raises GssError without any."""
        handle = self.handle()
        self.call('acquire_cred', None, self.number(self.FOREVER), None, self.ACCEPT,
                  self.reference(handle), None, None)
        try:
            yield handle
        finally:
            self.call('release_cred', self.reference(handle))


@functools.lru_cache(1)
def gss_library():
    """The one `GssLibrary` of this process."""
    return GssLibrary()


class GssContext:
    """One side of a GSSAPI security context.

    name          the service to authenticate to, SERVICE@HOST; None to accept a client
    in_sequence   whether messages must arrive in order; datagrams need not
    peer          the principal of the client that was accepted
    level         the level of protection that was agreed on (RFC 1961 section 4)
    """
    CLEAR, INTEGRITY, CONFIDENTIALITY = 0, 1, 2
    DUPLICATE, OLD, OUT_OF_ORDER = 2, 4, 2 | 4 | 8 | 16         # bits of the status of unwrap()
    level = CONFIDENTIALITY
    peer = ''

    def __init__(self, name=None, in_sequence=True):
        self._name = name
        self._in_sequence = in_sequence
        self._library = gss_library()
        self._context = self._library.handle()
        self._lock = threading.Lock()           # the library allows one thread at a time
        self._flags = 0

    def step(self, token=b''):
        """Process the other side's token; return the token to send, and whether the context is
        complete.  Raises GssError."""
        library, output, flags = self._library, self._library.output(), self._library.number()
        function = self._accept if self._name is None else self._initiate
        try:
            status = function(library, token, output, flags)
        finally:
            token = library.taken(output)       # after an error too, to release the memory
        self._flags = flags.value
        return token, not status

    def _initiate(self, library, token, output, flags):
        """gss_init_sec_context() (RFC 2744 section 5.19), with the mechanism Kerberos."""
        name = library.imported(self._name)
        wanted = library.MUTUAL | library.REPLAY | library.CONF | library.INTEG
        if self._in_sequence:
            wanted |= library.SEQUENCE
        try:
            return library.call(
                'init_sec_context', None, library.reference(self._context), name,
                library.oid(library.KERBEROS), library.number(wanted), library.number(0),
                None, library.input(token), None, output, library.reference(flags), None)
        finally:
            library.call('release_name', library.reference(name))

    def _accept(self, library, token, output, flags):
        """gss_accept_sec_context() (RFC 2744 section 5.1); sets `peer` at its end."""
        peer, name = library.handle(), library.output()
        with library.keys() as keys:
            status = library.call(
                'accept_sec_context', library.reference(self._context), keys,
                library.input(token), None, library.reference(peer), None, output,
                library.reference(flags), None, None)
        if not status:
            library.call('display_name', peer, name, None)
            library.call('release_name', library.reference(peer))
            self.peer = library.taken(name).decode('utf-8', 'replace')
            if not flags.value & library.REPLAY:        # required by RFC 1961 section 3
                raise GssError(errno.EACCES, 'GSSAPI: the client did not ask for replay detection')
        return status

    def allows(self, level):
        """Whether the context can protect messages at a level."""
        needed = {self.CLEAR: 0, self.INTEGRITY: self._library.INTEG,
                  self.CONFIDENTIALITY: self._library.CONF}[level]
        return self._flags & needed == needed

    def wrap(self, data, is_secret):
        """The token that protects `data`, encrypted or only signed."""
        library, output = self._library, self._library.output()
        with self._lock:
            library.call('wrap', self._context, int(is_secret), 0, library.input(data),
                         library.reference(library.number()), output)
        return library.taken(output)

    def unwrap(self, token):
        """Return the data of a token, whether it was encrypted, and the status.  Raises GssError.
        """
        library, output, is_secret = self._library, self._library.output(), self._library.number()
        with self._lock:
            status = library.call('unwrap', self._context, library.input(token), output,
                                  library.reference(is_secret), None)
        return library.taken(output), bool(is_secret.value), status

    def largest(self):
        """The number of bytes that fit in one message (RFC 1961 section 5: tokens of 64 KiB)."""
        library, largest = self._library, self._library.number()
        library.call('wrap_size_limit', self._context, self.level == self.CONFIDENTIALITY, 0,
                     GssMessage.LARGEST, library.reference(largest))
        return largest.value

    def seal(self, data):
        """The message that protects `data` at the agreed level.  Raises OSError if it is too long.
        """
        token = self.wrap(bytes(data), self.level == self.CONFIDENTIALITY)
        if len(token) > GssMessage.LARGEST:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        return GssMessage(GssMessage.DATA, token).pack()

    def unseal(self, message):
        """The data of a datagram that seal() made; b'' if it is malformed, or a replay."""
        read, rest = reader(message)
        with contextlib.suppress(OSError, EOFError):    # anyone can send such a datagram
            token = GssMessage.unpack_token(GssMessage.DATA, read)
            if not rest():
                return self.open(token, self.DUPLICATE | self.OLD)
        return b''

    def open(self, token, forbidden):
        """The data of a token.  Raises OSError if it is not protected at the agreed level, or its
        status has one of the bits in `forbidden`."""
        data, is_secret, status = self.unwrap(token)
        if self.level == self.CONFIDENTIALITY and not is_secret:
            raise OSError(errno.EBADMSG, 'GSSAPI: a message is not encrypted')
        if status & forbidden:
            raise OSError(errno.EBADMSG, 'GSSAPI: a message was replayed or is out of sequence')
        return data

    def __del__(self):
        if getattr(self, '_context', None):
            with contextlib.suppress(OSError):          # there is nowhere to report it
                self._library.call('delete_sec_context', self._library.reference(self._context),
                                   None)


class HttpForward(Layer):
    """The client's side of one forwarded HTTP request.

    From the client, only the body of the request is passed on, so that no second request reaches
    the target unseen.  To the client, the head of the answer says that the connection will close
    (RFC 9112 section 9.6); if the target does not answer in HTTP, the proxy answers.  After a
    status of 101 it passes everything (RFC 9110 section 7.8).
    """
    INTERIM = 10                        # most answers with a status of 1xx before the last one

    def __init__(self, sock, request):
        super().__init__(sock)
        self._request = request
        self._body = HttpBody(request.length)
        self._head = bytearray()        # the part that has arrived; None when it is passed on
        self._interim = self.INTERIM    # how many more are allowed
        self._is_over = False           # the client has sent bytes after its request
        self._is_tunnel = False         # the protocol was switched

    def take(self, data):
        """The part of `data`, bytes from the client, that belongs to the request's body."""
        count = self._body.take(data)
        self._is_over |= count < len(data)
        return data[:count]

    def recv_into(self, buffer, size):
        if not self._is_tunnel:         # framing is slow to parse: little of it at a time
            size = min(size, self._body.left + HttpBody.LONGEST)
        count = self._sock.recv_into(buffer, size)
        if self._is_tunnel or not count:
            return count
        taken = 0
        if not self.failure:            # else discard: unread bytes would turn close() into RST
            try:
                taken = len(self.take(memoryview(buffer)[:count]))
            except ProtocolError as error:
                self._fail(HttpCode.BAD_REQUEST, error)
        if not taken:
            raise BlockingIOError(errno.EAGAIN, 'the request is over')
        return taken

    def send(self, data):
        if self.failure:
            raise OSError(errno.EBADMSG, self.failure)
        if self._head is None and not self._cipher and not self._plain:
            return self._sock.send(data)
        return super().send(data)

    def _seal(self, data):
        if self._head is None:
            self._cipher += data
            return len(data)
        start = max(0, len(self._head) - 2)
        self._head += data
        try:
            while self._head is not None and self._pass_head(start):
                start = 0
        except ProtocolError as error:
            self._fail(HttpCode.BAD_GATEWAY, error)
        return len(data)

    def _pass_head(self, start):
        """Pass on the head of an answer if it is complete; return whether it is.

        `start` is where to search for its end: before that there is none.
        """
        end = HttpHead.END.search(self._head, start)
        if (end.end() if end else len(self._head)) > MAX_HEAD:
            raise ProtocolError(f'HTTP answer with a head of more than {MAX_HEAD} bytes')
        if not end:
            return False
        head, rest = HttpHead.unpack_answer(self._head[:end.end()]), self._head[end.end():]
        code, fields = int(head.start[9:12]), [('Via', f'{head.start[5:8]} socks.py')]
        self._interim -= code < 200
        # A switch that the client did not ask for would let the target interpret its next bytes.
        if not self._interim or code == 101 and (self._is_over or not self._request.upgrade):
            raise ProtocolError(f'unexpected HTTP answer {code} of the target')
        if code == 101:
            fields += ('Connection', 'Upgrade'), ('Upgrade', ', '.join(head.values('upgrade')))
        elif code >= 200:
            fields.append(('Connection', 'close'))
        # RFC 9112 section 6.3: with both, Content-Length does not count and is removed.
        without = ('content-length',) * bool(head.values('transfer-encoding'))
        self._cipher += HttpHead(head.start, (*head.end_to_end(*without), *fields)).pack()
        self._is_tunnel = code == 101
        self._head = rest
        if code == 101 or code >= 200:
            self._head = None
            self._cipher += rest
        return True

    def _fail(self, code, error):
        """Send an answer in place of the target's, and end.  Raises OSError if the target's answer
        has begun."""
        self.failure = f'{"refused" if code == HttpCode.BAD_REQUEST else "failed"}: {error}'
        if self._head is None:
            raise OSError(errno.EBADMSG, self.failure)
        self._head = None
        self._cipher += HttpAnswer(code, str(error), self._request.method != 'HEAD').pack()
        self.shutdown(socket.SHUT_WR)

    def shutdown(self, how):
        if self._head is not None:
            self._fail(HttpCode.BAD_GATEWAY, 'the target has ended without an HTTP answer')
        elif not self._ending:
            super().shutdown(how)


class GssLayer(Layer):
    """GSSAPI's protection of a connection (RFC 1961 section 5).

    `incoming` is bytes that were read together with the last message of the negotiation.
    """
    RECORD = 1 << 16                    # more than the bytes that one message protects

    def __init__(self, sock, context, incoming=b''):
        super().__init__(sock)
        self.context = context
        self._incoming = incoming
        self._largest = context.largest()

    def recv_into(self, buffer, size):
        """Read at most `size` bytes of the socket, and all that they decrypt to; return its length.

        `buffer` has room for `size` bytes and 2 RECORDs.
        """
        buffer = memoryview(buffer)
        count = self._open(buffer)
        if not count:
            data = self._sock.recv(min(size, len(buffer) - 2 * self.RECORD))
            if not data:
                if self._incoming:
                    raise ConnectionResetError(errno.ECONNRESET, 'ended within a GSSAPI message')
                return 0
            self._incoming += data
            count = self._open(buffer)
            if not count:
                raise BlockingIOError(errno.EAGAIN, 'a part of a GSSAPI message')
        return count

    def _open(self, buffer):
        """Decrypt the complete messages into `buffer`; return the number of bytes."""
        (read, _), used, count = reader(self._incoming), 0, 0
        with contextlib.suppress(EOFError):     # the rest is a part of a message
            while True:
                try:
                    token = GssMessage.unpack_token(GssMessage.DATA, read)
                except ProtocolError as error:  # too late for a reply: it is the tunnel's failure
                    raise OSError(errno.EBADMSG, str(error)) from None
                data = self.context.open(token, self.context.OUT_OF_ORDER)
                buffer[count:count + len(data)] = data
                count += len(data)
                used += 4 + len(token)
        self._incoming = self._incoming[used:]
        return count

    def _seal(self, data):
        self._cipher += b''.join(self.context.seal(data[start:start + self._largest])
                                 for start in range(0, len(data), self._largest))
        return len(data)


class WrappedDatagrams:
    """A UDP socket whose datagrams are wrapped in messages, one each: of GSSAPI, or of SOCKS6.

    wrap      function(datagram): the message for it
    unwrap    function(message): the datagram in it; b'' if none is, as anyone may have sent it
    """

    def __init__(self, sock, wrap, unwrap):
        self._sock, self._wrap, self._unwrap = sock, wrap, unwrap
        self.fileno, self.close, self.connect = sock.fileno, sock.close, sock.connect
        self.getsockname = sock.getsockname

    def recvfrom_into(self, buffer):
        length, source = self._sock.recvfrom_into(buffer)
        datagram = self._unwrap(bytes(buffer[:length]))
        buffer[:len(datagram)] = datagram
        return len(datagram), source

    def send(self, datagram):
        self._sock.send(self._wrap(datagram))

    def sendto(self, datagram, address):
        self._sock.sendto(self._wrap(datagram), address)


def protected(sock, control):
    """The UDP socket `sock`, with its datagrams protected as its TCP connection `control` is by
    GSSAPI, if it is (RFC 1961 section 5)."""
    context = getattr(control, 'context', None)
    return WrappedDatagrams(sock, context.seal, context.unseal) if context else sock


def message_of(form, datagram):
    """The bytes of the message for a datagram.  Raises OSError if it is too long for one."""
    try:
        return form(datagram).pack()
    except ValueError as error:
        raise OSError(errno.EMSGSIZE, str(error)) from None


def interleave(addresses):
    """The addresses with their families in turn, that of the first one first (RFC 8305 section 4).
    """
    families = {}
    for address in addresses:
        families.setdefault(family_of(address.host), []).append(address)
    return in_turn(*families.values())


def usable(addresses, settings):
    """The addresses that `Settings.family` allows, in the order of `Settings.prefer`.

    Raises OSError if there is none.
    """
    family, prefer = settings.family, settings.prefer
    if family:
        addresses = [each for each in addresses if (':' in each.host) == (family == 6)]
        if not addresses:
            raise OSError(errno.ENETUNREACH, f'only IPv{family} is used')
    if prefer:
        addresses = sorted(addresses, key=lambda each: (':' in each.host) != (prefer == 6))
    return addresses


def start_connect(address, source):
    """Return a non-blocking socket that connects to `address`, and whether it is connected.

    `source` has the local addresses to use, at most one of each family; if it has others only, the
    address is unreachable.  Raises OSError.
    """
    family = socket.AF_INET6 if ':' in address.host else socket.AF_INET
    sock = _orig_socket(family, NEW_STREAM)
    try:
        if '%' in address.host:
            address = address.sockaddr
        if sock.gettimeout() != 0:      # there is no SOCK_NONBLOCK, or gevent's class ignores it
            sock.setblocking(False)
        # A relay sends what it has: Nagle's algorithm would only delay that, tcp(7).
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)      # else a dead peer stays
        if source:
            if sys.platform == 'linux':
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind(source_of(family, source).sockaddr)
        error = sock.connect_ex(address)
        # On Linux, one to the same host is done by now: no need to wait.
        if error in UNDER_WAY and sys.platform == 'linux':
            error = sock.connect_ex(address)
        is_connected = error in CONNECTED
        if not is_connected and error not in UNDER_WAY:
            raise OSError(error, os.strerror(error))
        return sock, is_connected
    except BaseException:
        sock.close()
        raise


def source_of(family, source):
    """The local `Address` to use for a family: an item of `source`, a host or an `Address`.

    It is unspecified if `source` is empty.  Raises OSError if that has other families only.
    """
    if not source:
        return Address('::' if family == socket.AF_INET6 else '0.0.0.0', 0)
    for item in source:
        address = item if isinstance(item, Address) else Address(item, 0)
        if family_of(address.host) == family:
            return address
    wanted = 'IPv6' if family == socket.AF_INET6 else 'IPv4'
    raise OSError(errno.ENETUNREACH, f'no source address for {wanted}')


def local_ip_towards(hosts, source):
    """The IP address of this host from which the first reachable one of `hosts` is reached.

    Raises OSError if none is reachable.
    """
    for host in hosts:
        family = family_of(host)
        try:
            with _orig_socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind(source_of(family, source)._replace(port=0).sockaddr)
                sock.connect(Address(host, 9).sockaddr)         # sends nothing, see connect(2)
                return local_address(sock).host
        except OSError as caught:
            error = caught
    raise error


def error_rank(error):
    """A number that is lower, the more the error of an attempt says about the target."""
    return ERROR_RANKS.get(reply_for(error), len(ERROR_RANKS))


class Race(NamedTuple):
    """The attempts of dial() to connect.

    A client chooses the name, and so how many addresses there are, none of which may answer.  So
    beyond the first attempt of each race, which is free, there are at most RACERS at a time, SHARE
    for one owner.  A race without room waits for its attempts before it starts the next one.
    """
    waiting: deque                      # the `Address`es to try
    racing: Dict[_orig_socket, Address]         # by the sockets of the attempts under way
    errors: List[OSError]               # why the others have failed
    source: Sequence                    # local addresses, see start_connect()
    note: Optional[Callable]            # function(text, *args) that logs a step
    owner: Any                          # key of a client, or None for one without a share

    RACERS, SHARE = 64, 16
    racers = {}                         # owners by the sockets of these attempts

    def has_room(self):
        """Whether one more attempt may start beside another one."""
        return len(self.racers) < self.RACERS and (
            self.owner is None or list(self.racers.values()).count(self.owner) < self.SHARE)

    def start(self):
        """Start the next attempt that does not fail at once, if there is one, and room for it.

        The result is its socket if that is connected already, else None.
        """
        while self.waiting and (not self.racing or self.has_room()):
            address = self.waiting.popleft()
            if self.note:
                self.note('dialling %s', address)
            try:
                sock, is_connected = start_connect(address, self.source)
            except OSError as error:
                self.failed(address, error)
                continue
            if is_connected:
                return sock
            if self.racing:
                self.racers[sock] = self.owner
            self.racing[sock] = address
            break
        return None

    def finish(self, sock):
        """Take the result of an attempt whose socket is ready; whether it has succeeded."""
        address, error = self.leave(sock), sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            sock.close()
            self.failed(address, OSError(error, os.strerror(error)))
        return not error

    def leave(self, sock):
        """Take an attempt out of the race; its address."""
        self.racers.pop(sock, None)
        return self.racing.pop(sock)

    def failed(self, address, error):
        """Note why an attempt has failed."""
        self.errors.append(error)
        if self.note:
            self.note('%s: %s', address, reason(error))


if hasattr(os, 'register_at_fork'):     # since Python 3.7; the threads of these races are not there
    os.register_at_fork(after_in_child=Race.racers.clear)


def dial(addresses, until=None, source=(), note=None, owner=None):
    """Conversation: a non-blocking socket, connected to the first address that answers (RFC 8305
    section 5).

    An attempt starts when the one before it fails, or after ATTEMPT_DELAY seconds.  If all fail,
    the error that says most is raised, the last one of several.  note(text, *args) is called to log
    each attempt; `owner` has a share of them, see `Race`.
    """
    waiting, racing, errors = deque(addresses), {}, []
    if len(addresses) > 1:
        waiting = deque(interleave(addresses)[:ATTEMPTS])
    race = make(Race, (waiting, racing, errors, source, note, owner))
    try:
        sock = race.start()
        while racing and not sock:
            # The last attempt has no successor to start, so it may take until the end.
            pause = ATTEMPT_DELAY if waiting else None
            ready = yield from wait_ready((), list(racing), until, pause)
            sock = next(filter(race.finish, ready), None) or race.start()
        if sock:
            return sock
    except socket.timeout as error:
        errors.append(error)
    finally:                            # also when the client has left
        for loser in list(racing):
            race.leave(loser)
            loser.close()
    try:
        raise min(reversed(errors), key=error_rank)
    finally:
        errors.clear()                  # breaks the cycle, as in run()


def keep_urgent(sock):
    """Keep urgent data of TCP in the stream, socket(7); by default, recv() skips its last byte."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def bound(address, kind=socket.SOCK_STREAM, overlaps=False):
    """A non-blocking socket bound to `address`, an IP address; a TCP one is ready for listen().

    `overlaps` is whether the port may be in use on overlapping addresses, see let_overlap().

    Raises OSError with the address in its text.
    """
    family = family_of(address.host)
    sock = _orig_socket(family, kind)
    try:
        sock.setblocking(False)
        if os.name != 'posix':          # on Windows, SO_REUSEADDR would share a port in use
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        elif kind == socket.SOCK_STREAM:        # despite old connections in TIME_WAIT
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:   # systems have different defaults
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:  # accepted sockets inherit these
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            keep_urgent(sock)
        if overlaps:
            let_overlap([sock], True)
        sock.bind(address.sockaddr)
        return sock
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f'cannot listen on {address}: {error.strerror}') from None


def listening_at(path, mode=None):
    """A unix socket that listens at `path`, with the permissions `mode`, by default 0600 less the
    umask.

    A socket file without a listening server is replaced.  Raises OSError with the path in its text.
    """
    if not hasattr(socket, 'AF_UNIX'):
        raise OSError(errno.EAFNOSUPPORT, f'{path}: this system has no unix sockets')
    sock = _orig_socket(socket.AF_UNIX)
    umask = os.umask(0o177)             # before chmod(), no other account may connect either
    try:
        sock.setblocking(False)
        if is_stale(path):
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, 0o600 & ~umask if mode is None else mode)
        sock.listen(1)                  # from now on it is not stale; the server sets the length
        return sock
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f'cannot listen on unix:{path}: {reason(error)}') from None
    finally:
        os.umask(umask)


def is_stale(path):
    """Whether there is a unix socket at `path` on which no server listens."""
    with _orig_socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return (os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode)
                and probe.connect_ex(path) == errno.ECONNREFUSED)


def account_of(sock):
    """The account of the process at the other end of a unix socket (SO_PEERCRED, unix(7)).

    Its name, its number if it has no name, or '-' where the system does not tell.
    """
    if sys.platform != 'linux':         # OpenBSD has another structure
        return '-'
    try:
        import pwd
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, user_id, _ = struct.unpack('iII', peer)      # pid, uid, gid
    except ImportError:
        return '-'
    try:
        return printable(pwd.getpwuid(user_id).pw_name)
    except KeyError:
        return str(user_id)


def let_overlap(sockets, may):
    """Set whether one more socket may use the port of `sockets`, which have allowed it, too.

    With that, a port can be in use on all addresses and on single ones, whose sockets get the
    datagrams for them.  Other processes of the same user could use it, too, to get datagrams, so
    let it be set during a bind() only.
    """
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, may)


def bound_udp(address, overlaps=False):
    """A UDP socket as bound() makes it, with a receive buffer of RECEIVE_BUFFER bytes, or as many
    as the system allows."""
    sock = bound(address, socket.SOCK_DGRAM, overlaps)
    options = [socket.SO_RCVBUF]
    if sys.platform == 'linux':
        options.insert(0, SO_RCVBUFFORCE)
    size = RECEIVE_BUFFER
    # At the latest the size that the socket has already ends the search.
    while options and size > sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF):
        try:
            sock.setsockopt(socket.SOL_SOCKET, options[0], size)
            break
        except PermissionError:         # not root
            del options[0]
        except OSError:                 # BSD refuses sizes beyond its limit; Linux reduces them
            size //= 2
    return sock


class UdpPorts:
    """Binds UDP sockets to random ports of a range, which are harder to guess for others.

    It tries no port that it has given out, so that it finds a free one quickly in a range that is
    nearly used up.  One client gets half of a range at most.
    """
    ATTEMPTS = 64                       # ports tried for one socket; other programs may have them

    def __init__(self):
        self._ranges = {}               # by (host, ports): (array of free ports, Counter of owners)
        self._lock = threading.Lock()   # the threads of all loops use it

    def bind(self, host, ports, owner):
        """Return a socket, and a function to call when it is closed.

        `ports` is (lowest, highest), or (0, 0) for any port.  `owner` is the key of a client, or
        None for one without a limit.  Raises OSError if no port is free.
        """
        if not ports[1]:
            return bound_udp(Address(host, 0)), lambda: None
        lowest, highest = ports
        with self._lock:
            if (host, ports) not in self._ranges:       # settings may change any number of times
                self._ranges = {key: value for key, value in self._ranges.items() if value[1]}
                self._ranges[host, ports] = array.array('H', range(lowest, highest + 1)), Counter()
            free, owners = self._ranges[host, ports]
            if owner is not None and owners[owner] >= max(1, (highest - lowest + 1) // 2):
                raise OSError(errno.EADDRINUSE, 'this client has half of the UDP ports')
            sock, port = self._bind(host, ports, free)
            owners[owner] += 1
        return sock, functools.partial(self._give_back, free, port, owners, owner)

    @staticmethod
    def _take(free):
        """Remove and return a random port, in constant time."""
        place = int.from_bytes(os.urandom(4), 'big') % len(free)
        free[place], free[-1] = free[-1], free[place]
        return free.pop()

    @staticmethod
    def _bound_if_free(address):
        """A UDP socket bound to `address`, or None if the port is in use."""
        try:
            return bound_udp(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return None

    def _bind(self, host, ports, free):
        """Return a socket and its port, which is taken from `free`."""
        tried = []                      # ports to put back into `free`
        try:
            while free and len(tried) < self.ATTEMPTS:
                tried.append(self._take(free))
                sock = self._bound_if_free(Address(host, tried[-1]))
                if sock:
                    return sock, tried.pop()
        finally:
            free.extend(tried)
        raise OSError(errno.EADDRINUSE, 'no UDP port from %d to %d is free' % ports)

    def _give_back(self, free, port, owners, owner):
        with self._lock:
            free.append(port)
            owners[owner] -= 1
            if not owners[owner]:
                del owners[owner]


def tcp_pair(near=None, window=None):
    """Two non-blocking TCP sockets that are connected to each other.

    Programs can set TCP's options on them, which the unix sockets of socketpair() do not have.

    near      a new socket to be the first one
    window    receive buffer of the second one, in bytes
    """
    with bound(Address('127.0.0.1', 0)) as listener:
        if window:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        listener.listen(1)
        host, port = listener.getsockname()
        if near is None:
            near, _ = start_connect(Address(host, port), ())
        else:
            prefix = '::ffff:' if near.family == socket.AF_INET6 else ''
            error = near.connect_ex((prefix + host, port))
            if error not in (0, *UNDER_WAY):
                raise OSError(error, os.strerror(error))
        try:
            poll([listener], (), deadline(1))
            far, address = listener.accept()
            host, port = near.getsockname()[:2]
            if address != (plain_ip(host), port):       # another program was quicker
                far.close()
                raise OSError(errno.ECONNABORTED, 'another program connected to the socket pair')
        except BaseException:
            near.close()
            raise
    far.setblocking(False)
    return near, far


def stock_pair():
    """Two connected sockets of the original class, whatever class socket.socket is by now."""
    if not hasattr(_socket, 'socketpair'):      # Windows
        return tcp_pair()
    return [_orig_socket(half.family, half.type, half.proto, half.detach())
            for half in _socket.socketpair()]


# ----------------------------------------------------------------------------------------- access

class Settings(NamedTuple):
    """The settings of a server, with their defaults.

    Times are in seconds.  `Server` also accepts the texts of the command line for networks, rules,
    proxies, addresses, ports and numbers; one text may have several rules, one a line.  For a wrong
    value it raises ValueError, which names the field.  A field has the name of its option, or the
    option stands in parentheses.

    users              mapping from name to password: text, bytes or `Hashed`; empty: no login
                       (--user, --users)
    open               listen beyond loopback even if anyone can connect then; else refuse to start
    clients            ip_networks of the clients to serve; empty: all (--from)
    trusted            ip_networks of clients that need no password; empty: none (--trust)
    rules              `Rule`s, of which the first match decides; None: allow what is not local
                       (--rules FILE)
    upstream           `Proxy`s for connections and UDP, first hop first; empty: none (--proxy)
    tls                ssl.SSLContext for the connections of clients; None: no TLS (--tls-cert,
                       --tls-key, --tls-client-ca)
    udp_over_plain     allow UDP beside TLS, although datagrams are not encrypted
    gssapi             protection levels to offer, as in `GssContext`; empty: no GSSAPI; without
                       users, GSSAPI is the only login (--gssapi, --gssapi-level)
    gssapi_nec         negotiate the level without protection, as NEC's programs do
    ident              ask the hosts of SOCKS4 clients to confirm the userid (RFC 1413)
    http               also serve HTTP clients: CONNECT, and requests for http URLs (--no-http)
    socks6             also serve clients of SOCKS6, an expired draft, see `Request6`
    unix_mode          permissions of new unix sockets; None: 0600, less the umask
    balancers          ip_networks whose connections begin with a PROXY header; empty: none
                       (--proxy-protocol)
    source             IP addresses to connect from, one of a family; empty: the system chooses
    advertise          IP addresses to name in replies to BIND and UDP ASSOCIATE (proxy behind
                       NAT), one of a family; empty: the address that the client connected to
    udp_ports          (lowest, highest) port for the datagrams of clients; (0, 0): any free port
    udp_port           one port for the datagrams of all clients, see `SharedPort`; 0: each
                       association has one of its own
    family             4 or 6: connect to IPv4 or IPv6 only; 0: both (-4, -6)
    prefer             4 or 6: try addresses of this version of IP first; 0: as the system routes
    udp_strict         pass on datagrams only from addresses to which the client has sent some
    tor_extensions     offer Tor's commands RESOLVE and RESOLVE_PTR
    login_delay        time until the answer to a wrong password; 0: at once (no option)
    handshake_timeout  time from accept to the complete request; 0: no limit
    connect_timeout    time to connect to a target, for all its addresses; 0: no limit
    bind_timeout       time to wait for the peer of a BIND; 0: no limit
    idle_timeout       time without data that ends a tunnel; 0: no limit
    udp_timeout        time without datagrams that ends an association, four times as long if only
                       targets send; 0: no limit
    drain_timeout      time that clients get to finish when the server stops; 0: none (--drain)
    max_clients        clients served at once, others wait in the listen queue; 0: as many as the
                       limit of open files allows
    max_per_client     connections at once from an IPv4 address or IPv6 /64, others are closed; 0:
                       no limit; None: no limit for this host, for others half of max_clients, at
                       least 64, but at most three quarters of max_clients
    max_handshakes     clients at once without a complete request; one more closes the oldest of
                       the client that has most; 0: half of max_clients, bounded as above

    """
    users: UsersArgument = MappingProxyType({})
    open: bool = False
    clients: NetworksArgument = ()
    trusted: NetworksArgument = ()
    rules: Union[str, Sequence[Union[str, 'Rule']], None] = None
    upstream: Union[str, Sequence[Union[str, 'Proxy']], 'Proxy'] = ()
    tls: Optional['ssl.SSLContext'] = None
    udp_over_plain: bool = False
    gssapi: Sequence[int] = ()
    gssapi_nec: bool = False
    ident: bool = False
    http: bool = True
    socks6: bool = False
    unix_mode: Optional[int] = None
    balancers: NetworksArgument = ()
    source: HostsArgument = ()
    advertise: HostsArgument = ()
    udp_ports: Union[str, Tuple[int, int]] = (0, 0)
    udp_port: Union[int, str] = 0
    family: int = 0
    prefer: int = 0
    udp_strict: bool = False
    tor_extensions: bool = False
    login_delay: Union[float, str] = 1.0
    handshake_timeout: Union[float, str] = 30.0
    connect_timeout: Union[float, str] = 30.0
    bind_timeout: Union[float, str] = 120.0
    idle_timeout: Union[float, str] = 0.0
    udp_timeout: Union[float, str] = 300.0
    drain_timeout: Union[float, str] = 0.0
    max_clients: Union[int, str] = 0
    max_per_client: Union[int, str, None] = None
    max_handshakes: Union[int, str] = 0

    def __repr__(self) -> str:
        # Logs must not have passwords, which texts for proxies and ways may have.
        hidden = {name for name in ('upstream', 'rules') if any(
            isinstance(each, (str, bytes)) for each in getattr(self, name) or ())}
        fields = ', '.join(f'{name}={"..." if name in hidden else repr(value)}'
                           for name, value in zip(self._fields, self) if name != 'users')
        return f'Settings({counted(len(self.users), "user")}, {fields})'


class NetworkMap:
    """Values by ip_network.

    A look-up takes one step for each length of prefix in use, however many networks there are.
    """

    def __init__(self):
        # By length of addresses in bytes: by length of the host part in bits: values by prefix.
        self._tables = {4: {}, 16: {}}

    def add(self, network, value):
        network = plain_network(network)
        shift = network.max_prefixlen - network.prefixlen
        table = self._tables[network.max_prefixlen // 8].setdefault(shift, {})
        table.setdefault(int(network.network_address) >> shift, []).append(value)

    def find(self, packed):
        """The values of all networks that contain an IP address, given as 4 or 16 bytes."""
        number, found = int.from_bytes(packed, 'big'), []
        for shift, table in self._tables[len(packed)].items():
            found += table.get(number >> shift, ())
        return found


class Networks(tuple):
    """A tuple of ip_networks with a quick test for membership.

    The tables for it are made at the first look-up: most `Networks` are empty or never asked.
    """
    _map = _local = None

    def has(self, host):
        """Whether one of the networks contains the IP address `host`, a text."""
        return bool(self) and self.has_bytes(ip_bytes(host))

    def has_bytes(self, packed):
        """The same for an IP address of 4 or 16 bytes."""
        if self._map is None:
            self._map = NetworkMap()
            for network in self:
                self._map.add(network, network)
        return bool(self._map.find(packed))

    @property
    def local(self):
        """The networks that are inside one of LOCAL_NETWORKS."""
        if self._local is None:
            self._local = Networks(filter(is_inside_local, map(plain_network, self)))
        return self._local


def plain_network(network):
    """The ip_network `network`; the IPv4 network if it is one of v4-mapped addresses."""
    if network.version == 6 and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        return ipaddress.IPv4Network((int(network.network_address) & 0xFFFFFFFF,
                                      network.prefixlen - 96))
    return network


# Networks that only clients on the proxy's host may reach by default: the host itself, its link,
# multicast, reserved addresses, and the metadata services of clouds, which hand out credentials.
LOCAL_NETWORKS = Networks(map(ipaddress.ip_network, (
    '0.0.0.0/8', '127.0.0.0/8', '169.254.0.0/16', '224.0.0.0/4', '240.0.0.0/4',
    '::/128', '::1/128', 'fe80::/10', 'fec0::/10', 'ff00::/8',
    '100.100.100.200/32', '168.63.129.16/32', '192.0.0.192/32',         # Alibaba, Azure, Oracle
    'fd00:ec2::254/128', 'fd20:ce::254/128')))                          # Amazon, Google

ZEROS = ('0.0.0.0', '::')

# IPv6 addresses that contain an IPv4 address: their prefix, and the indexes of its bytes.  Gateways
# may deliver packets for them to the IPv4 address, so they are judged like that one.
LAST = (12, 13, 14, 15)
EMBEDDED = (
    (V4_MAPPED, LAST),                                  # RFC 4291 section 2.5.5.2
    (bytes(12), LAST),                                  # v4-compatible, RFC 4291 section 2.5.5.1
    (bytes(8) + b'\xff\xff\0\0', LAST),                 # IPv4-translated, RFC 2765 section 2.1
    (b'\0\x64\xff\x9b' + bytes(8), LAST),               # NAT64, RFC 6052 section 2.1
    (b'\x20\x02', (2, 3, 4, 5)),                        # 6to4, RFC 3056 section 2
    (b'\x20\x01\0\0', (4, 5, 6, 7)),                    # server of Teredo, RFC 4380 section 4
)
TEREDO = b'\x20\x01\0\0'                # the client is in the last 4 bytes, with all bits inverted
ISATAP = (b'\0\0\x5e\xfe', b'\2\0\x5e\xfe')             # bytes 8 to 11, RFC 5214 section 6.1
# NAT64 with a prefix for local use (RFC 8215): its length is not known, and decides where the IPv4
# address is (RFC 6052 section 2.2).
OWN_NAT64 = b'\0\x64\xff\x9b\0\1'
OWN_NAT64_PLACES = ((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12), LAST)


def with_embedded(packed):
    """A list of an IP address and each IPv4 address that it may contain, all as bytes."""
    found = [packed]
    if len(packed) == 16:
        found += [bytes(map(packed.__getitem__, places)) for start, places in EMBEDDED
                  if packed.startswith(start)]
        if packed.startswith(TEREDO):
            found.append(bytes(byte ^ 0xff for byte in packed[12:]))
        if packed[8:12] in ISATAP:
            found.append(packed[12:])
        if packed.startswith(OWN_NAT64):
            readings = [bytes(map(packed.__getitem__, places)) for places in OWN_NAT64_PLACES]
            found += [reading for reading in readings if reading[0]]    # a 0 is of the prefix
    return found


def is_inside_local(network):
    """Whether an ip_network, or an IPv4 network that it contains, is inside a local one."""
    start, length = network.network_address.packed, network.prefixlen
    readings = [network]
    # A network can hold IPv4 addresses only if it lies behind the whole prefix.
    for prefix, places in EMBEDDED if network.version == 6 else ():
        if start.startswith(prefix) and length >= 8 * places[0]:
            part = bytes(map(start.__getitem__, places))
            readings.append(ipaddress.IPv4Network((part, min(32, length - 8 * places[0]))))
    # A single address is judged as a target is, by all forms that contain an IPv4 address.
    return (length == network.max_prefixlen and is_local(ip_text(start))
            or any(each.prefixlen >= local.prefixlen and each.network_address in local
                   for each in readings for local in LOCAL_NETWORKS))


@functools.lru_cache(4096)
def is_local(host):
    """Whether the IP address `host`, or an IPv4 address that it contains, is in LOCAL_NETWORKS."""
    return any(map(LOCAL_NETWORKS.has_bytes, with_embedded(ip_bytes(host))))


@functools.lru_cache(4096)
def is_loopback(host):
    """Whether the IP address `host` is in 127.0.0.0/8, or is ::1."""
    packed = ip_bytes(host)
    return packed[0] == 127 if len(packed) == 4 else packed == LOOPBACK6


def is_ours(host):
    """Whether the IP address `host` belongs to this machine: whether a socket can bind to it."""
    with _orig_socket(family_of(host), socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(Address(host, 0).sockaddr)
        except OSError:
            return False
        return True


class Names(tuple):
    """Host names in lower case; one with a dot before it stands for the name and all below it."""
    _known = None

    def has(self, name):
        """Whether one of the items matches the host name `name`."""
        if self._known is None:
            self._known = frozenset(self)
        return not self._known.isdisjoint(name_keys(name))


def name_keys(name):
    """All items of `Names` that would match the host name `name`: for a.b these are a.b, .a.b, .b.
    """
    keys, dot = [name, '.' + name], name.find('.')
    while dot >= 0:
        keys.append(name[dot:])
        dot = name.find('.', dot + 1)
    return keys


class Way(NamedTuple):
    """How a connection, or a datagram, leaves, see `via` in parse_rule().

    chain         proxies, first hop first; empty: none
    source        local addresses, at most one of a family; empty: `Settings.source`
    is_inbound    from the local address that the client has connected to
    """
    chain: Tuple = ()
    source: Tuple[str, ...] = ()
    is_inbound: bool = False

    @property
    def passes_names(self):
        """Whether names are looked up by the last proxy, not here."""
        return bool(self.chain) and self.chain[-1].rdns


class Rule(NamedTuple):
    """Allows or denies requests that meet all its conditions.  An empty condition always holds.

    allow      True to allow, False to deny
    commands   `Command`s
    users      names of users, as they are logged
    clients    ip_networks of clients
    names      requested host names, in lower case; .name stands for the name and all below it
    networks   ip_networks of targets; `names` and `networks` are one condition, either may hold
    ports      (lowest, highest) pairs of ports of targets
    via        `Way` of what is allowed; None: as the settings say
    place      where the rule is written, for messages

    The order of the fields matters: warnings_about() relies on it.
    """
    allow: bool
    commands: Tuple = ()
    users: Tuple = ()
    clients: Tuple = ()
    names: Tuple = ()
    networks: Tuple = ()
    ports: Tuple = ()
    via: Optional[Way] = None
    place: str = 'a rule'

    def compiled(self):
        """The same rule with conditions that are quick to test, as `Rules` needs it."""
        return self._replace(users=frozenset(self.users), clients=Networks(self.clients),
                             names=Names(self.names), networks=Networks(self.networks))

    @property
    def is_for_all_hosts(self):
        """Whether the rule has no condition on the target's name or address."""
        return not (self.names or self.networks)

    @property
    def denied_versions(self):
        """The set of IP versions (4, 6) of which the rule denies all addresses and ports."""
        if self.allow or self.ports:
            return set()
        return {4, 6} if self.is_for_all_hosts else {
            network.version for network in self.networks if not network.prefixlen}

    def is_for_client(self, client):
        return ((not self.users or client.user in self.users)
                and (not self.clients or self.clients.has(client.address.host)))

    def concerns(self, client, port):
        """Whether all conditions but those on the target's host hold for a `Session`'s request."""
        return ((not self.commands or client.command in self.commands)
                and (not self.ports or any(low <= port <= high for low, high in self.ports))
                and self.is_for_client(client))

    def is_for_host(self, hosts, name):
        """Whether the condition on the target's host holds.

        hosts    result of asked_hosts() for its IP address
        name     the requested name, or None if an IP address was requested
        """
        if self.is_for_all_hosts or name and self.names.has(name):
            return True
        return any(map(self.networks.has_bytes, hosts[not self.allow]))

    def opens(self, host):
        """Whether the rule names a network inside the local ones that contains `host`.

        For zeros, a BIND for any peer, whether it names a network that contains zeros.
        """
        networks = self.networks if host in ZEROS else self.networks.local
        return any(map(networks.has_bytes, asked_hosts(host)[0]))


def asked_hosts(host):
    """Two lists of addresses, as bytes, to look up for the IP address `host`: in the networks of
    rules that allow, and of rules that deny.

    Denying an IPv4 network also denies the IPv6 addresses that lead into it; allowing it does not
    allow them.  Zeros stand for any peer of a BIND; a rule for either family may allow them.
    """
    packed = ip_bytes(host)
    return [bytes(4), bytes(16)] if host in ZEROS else [packed], with_embedded(packed)


class Rules(tuple):
    """A tuple of compiled `Rule`s, of which the first that matches decides.

    Theory of operation.  A condition is a list of keys, such as networks or names, of which one
    must match.  An index maps a key to the numbers of rules.  Each rule is in the index under the
    keys of one of its conditions, the one whose keys the fewest rules share.  A request has few
    keys itself, so a look-up finds a small set of candidates; these are tested whole, in the order
    of the file.  Rules without a condition that can be indexed are always candidates.
    """
    PORTS = 128                         # wider ranges of ports are not indexed

    def __new__(cls, rules):
        return super().__new__(cls, map(Rule.compiled, rules))

    def __init__(self, _):
        super().__init__()
        self._users, self._names, self._ports = {}, {}, {}      # the index: numbers of rules by key
        self._clients, self._networks = NetworkMap(), NetworkMap()
        self._always, openers = [], {}
        conditions = [self._conditions(rule) for rule in self]
        uses = Counter(key for lists in conditions for keys in lists for key in keys)
        for number, lists in enumerate(conditions):
            rarest = min(lists, default=(), key=lambda keys: max(map(uses.get, keys)))
            for kind, key in rarest:
                self._add_to_index(kind, key, number)
            if not rarest:
                self._always.append(number)
            rule = self[number]
            # A rule that is indexed by another condition is found by that.
            if rule.allow and rule.networks and rarest[0][0] in ('names', 'networks'):
                openers.setdefault((rule.commands, rule.users, rule.clients, rule.ports, rule.names,
                                    rule.via is None), number)
        # A name is looked up if any rule on networks may allow its addresses.  Of several rules
        # with the same other conditions, the first is enough to tell.
        self._openers = openers.values()
        self._openers_by_ways = [number for number in self._openers if self[number].via]
        self._general = [rule for rule in self if rule.allow or rule.denied_versions]
        self.have_ways = any(rule.via for rule in self)

    def _conditions(self, rule):
        """The conditions of a rule that can be indexed, each a list of (kind, key)."""
        # A range is cut at PORTS + 1, which is too many already.
        ports = [port for low, high in rule.ports
                 for port in range(low, min(high, low + self.PORTS) + 1)]
        lists = ([('users', user) for user in rule.users],
                 [('clients', network) for network in rule.clients],
                 [('names', name) for name in rule.names]
                 + [('networks', network) for network in rule.networks],
                 [('ports', port) for port in ports if len(ports) <= self.PORTS])
        return [keys for keys in lists if keys]

    def _add_to_index(self, kind, key, number):
        index = getattr(self, '_' + kind)
        if isinstance(index, NetworkMap):
            index.add(key, number)
        else:
            index.setdefault(key, []).append(number)

    def _candidates(self, client, port, name, *more):
        """The rules that may match, in order; `more` are further sequences of their numbers."""
        numbers = {*self._always, *self._users.get(client.user, ()), *self._ports.get(port, ()),
                   *self._clients.find(ip_bytes(client.address.host))}
        for key in name_keys(name) if name and self._names else ():
            numbers.update(self._names.get(key, ()))
        return map(self.__getitem__, sorted(numbers.union(*more)))

    def _matching(self, client, target, name):
        """Iterate over the rules that match `target`, the `Address` of an IP address, in order."""
        hosts = asked_hosts(target.host)
        found = map(self._networks.find, {*hosts[0], *hosts[1]})
        for rule in self._candidates(client, target.port, name, *found):
            if rule.concerns(client, target.port) and rule.is_for_host(hosts, name):
                yield rule

    def _matching_name(self, client, target, is_final):
        """Iterate over the rules that match `target`, the `Address` of a name, in order, and over
        those that may allow one of its addresses."""
        name, openers = target.host, self._openers_by_ways if is_final else self._openers
        for rule in self._candidates(client, target.port, name, openers):
            if rule.concerns(client, target.port) and (
                    rule.is_for_all_hosts or rule.names.has(name)
                    or rule.allow and rule.networks and (rule.via or not is_final)):
                yield rule

    def first(self, client, target, name=None):
        """The rule that decides about `target`, the `Address` of an IP address, or None.

        client    the `Session`
        name      the requested name, or None if an IP address was requested
        """
        return next(self._matching(client, target, name), None)

    def first_for_name(self, client, target, is_final):
        """The rule that decides about `target`, the `Address` of a name, before it is looked up.

        That is the first rule that matches by name, or that might allow one of the name's
        addresses; None if there is no such rule.  So a forbidden name causes no look-up.

        is_final    the name is not resolved here, so rules on networks cannot allow it, except
                    those with a way of their own
        """
        return next(self._matching_name(client, target, is_final), None)

    def ways(self, client, target, name=None):
        """The `Way`s to an IP address, asked for by `name` or not, in the order in which to try
        them; None stands for that of the settings.

        The rule that decides has the first one, the further rules that allow the same have the
        others, up to the first without a way.
        """
        return self._ways(self._matching(client, target, name))

    def ways_by_name(self, client, target, is_final, select=itertools.takewhile):
        """The `Way`s to a name, like ways(), by the rules that match by name, up to the first one
        that may match one of its addresses; if the list is empty, the name must be looked up, and
        its addresses decide.

        is_final    as in first_for_name()
        select      `filter` if the name has no addresses: no rule on networks will match
        """
        return self._ways(select(lambda rule: rule.is_for_all_hosts or rule.names.has(target.host),
                                 self._matching_name(client, target, is_final)))

    @staticmethod
    def _ways(rules):
        """The `Way`s of rules that match, in order."""
        ways = []
        for rule in rules:
            if not rule.allow:
                break
            ways.append(rule.via)
            if rule.via is None:
                break
        return ways

    def may_allow(self, client, command):
        """Whether the rules may allow `client` (a `Session`) the command for at least one target.

        It may err on the side of True: each target is judged later.
        """
        denied = set()
        for rule in self._general:
            if (not rule.commands or command in rule.commands) and rule.is_for_client(client):
                if rule.allow:
                    return True
                denied |= rule.denied_versions
                if len(denied) == 2:
                    return False
        return False


def allowing(rule, target):
    """Return `rule`, the one that decides about `target`; raise Refused if it denies or is None."""
    if not rule:
        raise Refused(f'no rule matches {target}')
    if not rule.allow:
        raise Refused(f'{rule.place} denies {target}')
    return rule


RULE_COMMANDS = {'connect': (Command.CONNECT,), 'bind': (Command.BIND,),
                 'udp': (Command.UDP_ASSOCIATE,),
                 'resolve': (Command.RESOLVE, Command.RESOLVE_PTR)}
WAY_COMMANDS = Command.CONNECT, Command.UDP_ASSOCIATE   # which may leave in several ways
RULE_SECTIONS = {'user': 'users', 'from': 'clients', 'to': 'names', 'via': 'via'}


def parse_rule(text: str, place: str) -> Rule:
    """Parse one line of a rules file; FileError says what is wrong with it.

    A line has this form, without the break:

    allow|deny [connect|bind|udp|resolve ...] [user NAME ...] [from NETWORK ...]
    to NETWORK|NAME|.NAME|* ... [PORT|LOW-HIGH ...] [via direct|inbound|ADDRESS|URL ...]

    `via` chooses the way of what is allowed: direct, without a proxy; inbound, from the local
    address that the client has connected to; from a local ADDRESS, or one of each family; through
    the proxies of the URLs, first hop first.

    Words may be quoted, as 'Bob Smith'.  `place` names the line in messages.
    """
    try:
        (first, _), *words = split_rule(text) or [('', False)]
        if first not in ('allow', 'deny'):
            # Without what follows a colon: the file may be that of the users.
            raise ValueError(f'{first.partition(":")[0]!r}, expected allow or deny')
        rule = Rule(first == 'allow', place=place, **parse_conditions(words))
        if rule.via and not rule.allow:
            raise ValueError("'via' is not expected here, but after what is allowed")
        if rule.via and rule.commands and not {*WAY_COMMANDS} & {*rule.commands}:
            raise ValueError("'via' is for connections and UDP, expected no command, or one of "
                             "connect and udp")
        if rule.via and rule.via.chain and Command.UDP_ASSOCIATE in rule.commands:
            expect_udp(rule.via.chain)
        return rule
    except ValueError as error:
        raise FileError(f'{place}: {error}') from None


def expect_udp(chain):
    """Raise ValueError unless the last proxy of a chain can be asked for UDP."""
    if chain[-1].kind not in (SOCKS5, SOCKS6):
        raise ValueError(f'UDP through {chain[-1]}, expected SOCKS5 or 6 as the last proxy')


def split_rule(text):
    """The words of a line up to a comment, as a list of (word, is it quoted)."""
    words = []
    # White space must follow a closing quote, so that "a"b is an error instead of two words.
    for match in re.finditer(r'"([^"]*)"(?!\S)|\'([^\']*)\'(?!\S)|(\S+)', text):
        double, single, plain = match.groups()
        if plain is None:
            words.append((single if double is None else double, True))
        elif plain[0] == '#':
            break
        elif plain[0] in '"\'':
            raise ValueError(f'{plain}: expected a closing {plain[0]}, then a space')
        else:
            words.append((plain, False))
    return words


def parse_conditions(words):
    """The fields of a `Rule`, by name, from the words after "allow" or "deny".

    Sections come in the order commands, user, from, to, via; each word belongs to the section
    before it.  Raises ValueError.
    """
    parts = {'commands': [], 'users': [], 'clients': [], 'names': [], 'networks': [], 'ports': [],
             'via': []}

    section, is_for_all = 'commands', False
    for word, is_quoted in words:
        hosts = is_for_all or parts['names'] or parts['networks']
        if word in RULE_SECTIONS and not is_quoted:
            # Only "via" may follow "to", and only there.  Each section needs a word; "to" has
            # nothing in its own part if its words are networks or *.
            is_wrong = section == 'via' or (section == 'names') != (word == 'via')
            if is_wrong or section != 'commands' and not (hosts or parts[section]):
                raise ValueError(f'{word!r} is not expected here')
            section = RULE_SECTIONS[word]
        elif section == 'names' and word == '*':
            is_for_all = True
        elif section == 'names' and word in ('port', 'ports') and hosts:
            raise ValueError(f'{word!r} is not expected here; ports are numbers, as in: to * 80')
        else:
            kind, values = RULE_WORDS[section](word)
            parts[kind] += values
    if section not in ('names', 'via') or is_for_all == bool(parts['names'] or parts['networks']):
        raise ValueError('expected "to", then networks and names or else *; ports are numbers')
    via = parse_way(parts.pop('via')) if section == 'via' else None
    # Look-ups are judged with port 0, see do_RESOLVE().
    if (parts['commands'] and set(parts['commands']) <= set(RULE_COMMANDS['resolve'])
            and parts['ports'] and all(low for low, _ in parts['ports'])):
        raise ValueError('resolve has no port, so this never matches; expected no ports')
    return dict({name: tuple(values) for name, values in parts.items()}, via=via)


def parse_way(words):
    """The `Way` that the words after `via` mean; ValueError says what is wrong."""
    if words in (['direct'], ['inbound']):
        return Way(is_inbound=words == ['inbound'])
    hosts = [word for word in words if ip_bytes(word) is not None]
    if words and hosts == words and len(set(map(family_of, hosts))) == len(hosts):
        return Way(source=tuple(hosts))
    if words and not hosts and all('://' in word for word in words):
        try:
            return Way(chain=tuple(parse_chain(words)))
        except GeneralProxyError as error:
            raise ValueError(str(error)) from None
    # The words may be URLs with passwords, so they are not shown.
    raise ValueError('via: expected direct, inbound, an IP address of each family at most, or '
                     'proxy URLs')


def parse_command(word):
    """The field of a `Rule` that a word before "user", "from" and "to" belongs to, and its values.
    """
    if word not in RULE_COMMANDS:
        raise ValueError(f'{word!r}, expected connect, bind, udp, resolve, user, from or to')
    return 'commands', RULE_COMMANDS[word]


def parse_target(word):
    """The field of a `Rule` that a word after "to" belongs to, and its values."""
    if re.match('[0-9]+(-[0-9]+)?$', word):
        low, _, high = word.partition('-')
        low, high = int(low), int(high or low)
        if not low <= high < 65536:
            raise ValueError(f'{word!r}, expected PORT or LOW-HIGH, up to 65535')
        return 'ports', [(low, high)]
    if re.match('[0-9]+(,[0-9]+)+$', word):
        raise ValueError(f'{word!r}, expected ports as words: {word.replace(",", " ")}')
    if '://' in word:
        raise ValueError(f'{word!r}, expected a host, not a URL')
    if '/' in word or ip_bytes(word.strip('[]')):
        return 'networks', [parse_network(word)]
    with_port = re.match(r'([^:]+|\[.*\]):([0-9]+)$', word)
    if with_port:
        raise ValueError(f'{word!r}, expected the port as the next word: %s %s'
                         % with_port.groups())
    dot = '.' if word.startswith('.') else ''
    try:
        name = word if '*' in word else canonical(Address(word[len(dot):], 0)).host
    except ProtocolError as error:
        raise ValueError(str(error)) from None
    # canonical() makes no name like these, so the rule would never match.
    if '*' in name or ':' in name or name.rpartition('.')[2].isdigit():
        raise ValueError(f'{word!r}, expected a network, a name, .suffix, or * alone')
    return 'names', [dot + name]


def parse_network(text: str) -> Network:
    """The ip_network that a text names; an IPv4 network for v4-mapped addresses.

    Raises ValueError with the expected form, also for bits beyond the prefix: 10.0.0.1/8 may be
    meant as a network or as an address.
    """
    word = text.strip('[]')
    try:
        network = ipaddress.ip_network(word, strict=False)
    except ValueError:
        network = None
    host, percent, _ = word.partition('/')[0].partition('%')
    if percent and ip_bytes(host):
        raise ValueError(f'{text!r}, expected no zone')
    if not network:
        raise ValueError(f'{text!r}, expected a network, 192.0.2.0/24 for example')
    if ip_bytes(host) != network.network_address.packed:
        raise ValueError(f'{text!r}, expected {network} for the network, or {host} for the address')
    return plain_network(network)


# By section of a rule: a function of a word that gives the field of `Rule`, and the values.
RULE_WORDS = {
    'commands': parse_command, 'names': parse_target,
    'users': lambda word: ('users', [printable(word)]),
    'clients': lambda word: ('clients', [parse_network(word)]),
    'via': lambda word: ('via', [word])}


def all_of(function, items):
    """The list of function(*item) for each item.

    Raises FileError with the errors of all items, so that they can be mended at once.
    """
    results, faults = [], []
    for item in items:
        try:
            results.append(function(*item))
        except FileError as error:
            faults += error.args
    if faults:
        raise FileError(*faults)
    return results


def read_lines(option, path):
    """Iterate over the lines of a file, as (place, line), without empty lines and comments.

    line     bytes, stripped
    place    PATH:NUMBER, for messages

    Raises FileError, with the option that names the file, if it cannot be read.
    """
    try:
        with open(path, 'rb') as file:
            lines = file.readlines()
    except OSError as error:
        raise FileError(f'{option} {path}: {reason(error)}') from None
    for number, line in enumerate(lines, 1):
        line = re.sub(b'^' + codecs.BOM_UTF8, b'', line).strip()        # Notepad writes a BOM
        if line and not line.startswith(b'#'):
            yield f'{path}:{number}', line


def read_rules(path: str) -> Tuple[Rule, ...]:
    """The `Rule`s in a file; FileError has all errors with their lines."""
    return tuple(all_of(lambda place, line: parse_rule(name_text(line), place),
                        read_lines('--rules', path)))


class Hashed:
    """A password, known only by a hash.

    The text is METHOD:PARAMETERS:SALT:HASH, the last two in hexadecimal.

    Verifying is slow on purpose.  The password that was right last is therefore cached, as a fast
    hash with a random key of this process.
    """
    KEY = os.urandom(32)
    SCRYPT = 'scrypt:16384-8-1'         # n, r, p: 16 MiB and some 50 ms (RFC 7914 section 2)
    PBKDF2 = 'pbkdf2:600000'            # rounds of SHA-256

    def __init__(self, text: str) -> None:
        import hashlib                  # here, because few servers need it
        if text.count(':') != 3:
            raise ValueError('expected METHOD:PARAMETERS:SALT:HASH, as --hash-password prints it')
        self._text = text
        self._method, parameters, salt, digest = text.split(':')
        self._parameters = [int(number) for number in parameters.split('-')]
        self._salt, self.digest = bytes.fromhex(salt), bytes.fromhex(digest)
        numbers = self._parameters
        # The bounds keep a wrong line of a file from taking gigabytes or hours.
        if not (self._method == 'pbkdf2' and len(numbers) == 1 and 0 < numbers[0] <= 1 << 24
                or self._method == 'scrypt' and hasattr(hashlib, 'scrypt')
                and len(numbers) == 3 and min(numbers) > 0
                and numbers[0] > 1 and not numbers[0] & numbers[0] - 1
                and numbers[0] * numbers[1] <= 1 << 20 and numbers[2] <= 64
                and numbers[1] * numbers[2] <= 1 << 19      # and what OpenSSL accepts
                and numbers[0].bit_length() <= 16 * numbers[1]):
            raise ValueError(self._method)
        self._verified = None

    def __eq__(self, other):
        return isinstance(other, Hashed) and self._text == other._text

    def __hash__(self):
        return hash(self._text)

    @classmethod
    def make(cls, password: bytes) -> str:
        """The text for a password, with a new random salt."""
        import hashlib
        kind = cls.SCRYPT if hasattr(hashlib, 'scrypt') else cls.PBKDF2
        start = f'{kind}:{os.urandom(16).hex()}:'
        return start + cls(start + '00')._hash(password).hex()

    def _hash(self, password):
        """The slow hash of a password, with the parameters and the salt of this one."""
        import hashlib
        if self._method == 'scrypt':
            n, r, p = self._parameters
            # OpenSSL's own limit of memory is 32 MiB; the parameters are bounded above.
            return hashlib.scrypt(password, salt=self._salt, n=n, r=r, p=p, dklen=32,
                                  maxmem=1 << 29)
        return hashlib.pbkdf2_hmac('sha256', password, self._salt, *self._parameters)

    def _fast_hash(self, password):
        import hmac
        return hmac.new(self.KEY, password, 'sha256').digest()

    def is_known(self, password):
        """Whether verify() has found the password right before."""
        import hmac
        return (self._verified is not None
                and hmac.compare_digest(self._verified, self._fast_hash(password)))

    def verify(self, password):
        """Whether the password is right; this blocks for some 50 ms or more."""
        import hmac
        same = hmac.compare_digest(self._hash(password), self.digest)
        if same:
            self._verified = self._fast_hash(password)
        return same


def parse_user(place, line):
    """(name, password) of a line NAME:PASSWORD or NAME:METHOD:...:HASH, as bytes or `Hashed`."""
    name, _, password = line.partition(b':')
    if not (0 < len(name) < 256 and 0 < len(password) < 256):
        raise FileError(f'{place}: expected NAME:PASSWORD, of 1 to 255 bytes each')
    if password.startswith((b'scrypt:', b'pbkdf2:')):
        try:
            password = Hashed(password.decode('ascii'))
            if len(password.digest) != 32:
                raise ValueError
        except ValueError:
            raise FileError(f'{place}: expected a hash as --hash-password prints it, with this '
                            f'Python if it lacks scrypt') from None
    return name, password


def read_users(path: str) -> Dict[bytes, Union[bytes, Hashed]]:
    """Passwords by user name from a file of NAME:PASSWORD and NAME:HASH lines.

    Raises FileError; logs a warning if other users of the system can read the file.
    """
    users = {}

    def add(place, line):
        name, password = parse_user(place, line)
        if name in users:
            raise FileError(f'{place}: expected each user once, {printable(name_text(name))} is '
                            f'defined twice')
        users[name] = password

    all_of(add, read_lines('--users', path))
    if not users:                       # else an empty file would mean: no login
        raise FileError(f'--users {path}: expected at least one NAME:PASSWORD line')
    warn_if_readable(path)
    return users


def warn_if_readable(path):
    """Log a warning if users other than the owner can read a file that holds secrets."""
    found = os.stat(path)
    # The group of another user's file is what lets this one read it, such as systemd's credentials.
    if os.name == 'posix' and found.st_mode & (0o077 if found.st_uid == os.geteuid() else 0o007):
        log.warning('%s: other users can read this file, expected mode 600', path)


class Users(dict):
    """Passwords by user name, as bytes; a password may be a `Hashed` instead."""

    def __init__(self, users=()):
        super().__init__((encoded(name), encoded(password))
                         for name, password in dict(users).items())
        self._decoy = next((each for each in self.values() if isinstance(each, Hashed)), None)

    def verify(self, credentials, until=None, is_hopeless=lambda: False):
        """Conversation: whether `credentials`, with `username` and `password`, are right.

        until          time limit, for `Call`
        is_hopeless    called just before slow work; if true, the login fails without that work
                       (the user may have reached the limit of failures in the meantime)

        If any user has a hashed password, a failed login takes as long for all names, known or
        not.  Otherwise the time would tell which names exist.
        """
        import hmac                     # here, because few servers need it and it is large
        given, password = credentials.password, self.get(credentials.username)
        if isinstance(password, Hashed):
            if password.is_known(given):
                return True
        # In this order, an unknown name takes as long as a wrong password.
        elif hmac.compare_digest(given, password or b'') and password is not None:
            return True
        hashed = password if isinstance(password, Hashed) else self._decoy

        def verify():                   # in a thread; meanwhile the same password may be verified
            return (hashed is password and hashed.is_known(given)
                    or not is_hopeless() and hashed.verify(given))

        same = hashed and (yield Call(verify, until, Worker.COSTLY))
        return bool(same) and hashed is password


class Failures:
    """Counts failed logins within WINDOW, for each pair of a client and a user name, and for each
    client.

    A client is identified by its `key`, see client_key().
    """
    LIMIT, WINDOW = 30, 60.0            # failures with one user name, seconds
    CLIENT_LIMIT = 300                  # failures with any user names; many may share an address
    ROOM = 16384                        # counters kept; the oldest makes room

    def __init__(self):
        self._since = {}                # (key, user or None): [time of the first failure, count]

    def _counters(self, key, user):
        """The counters of a login, as (key in `_since`, limit)."""
        return ((key, user), self.LIMIT), ((key, None), self.CLIENT_LIMIT)

    def note(self, key, user):
        """Count a failure.  Returns a list of (user or None, limit), one for each counter that has
        just reached its limit."""
        now, reached = time.monotonic(), []
        for each, limit in self._counters(key, user):
            if now > self._since.get(each, (now, 0))[0] + self.WINDOW:
                del self._since[each]
            # A flood from many addresses may so push a counter out; it cannot fill the memory.
            if len(self._since) >= self.ROOM and each not in self._since:
                del self._since[next(iter(self._since))]
            counter = self._since.setdefault(each, [now, 0])
            counter[1] += 1
            if counter[1] == limit:     # not beyond it: one warning for each window
                reached.append((each[1], limit))
        return reached

    def too_many(self, key, user):
        """Whether a login of `user` from that client must be refused without a check."""
        now = time.monotonic()
        for each, limit in self._counters(key, user):
            since, failures = self._since.get(each, (0, 0))
            if failures >= limit and now <= since + self.WINDOW:
                return True
        return False


# ------------------------------------------------------------------------------------------ loops

class Poller:
    """The part of select.epoll()'s interface that `Loop` uses, for systems without epoll."""
    READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

    def __init__(self):
        self._selector = selector = selectors.DefaultSelector()
        self.register, self.modify = selector.register, selector.modify
        self.unregister, self.close = selector.unregister, selector.close

    def poll(self, seconds, _):
        return [(key.fd, events) for key, events in self._selector.select(seconds)]


if hasattr(select, 'epoll'):            # used directly: `selectors` takes twice as long
    Poller = select.epoll
    READ, WRITE = select.EPOLLIN, select.EPOLLOUT
    # epoll_ctl(2): errors and hang-ups are always reported; edge-triggered, each only once.
    ERRORS = select.EPOLLET
else:
    READ, WRITE = Poller.READ, Poller.WRITE
    ERRORS = 0                          # not watched: errors show in the next read or write


class Waker:
    """A socket that is readable from wake(), which any thread may call, until clear()."""

    def __init__(self):
        self._reader, self._writer = stock_pair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self):
        return self._reader.fileno()

    def wakeup_fd(self):
        """The descriptor for signal.set_wakeup_fd()."""
        return self._writer.fileno()

    def wake(self):
        with contextlib.suppress(OSError):      # a full buffer is readable already
            self._writer.send(b'\0')

    def clear(self):
        with contextlib.suppress(OSError):      # it was empty
            self._reader.recv(4096)

    def close(self):
        self._reader.close()
        self._writer.close()


class Timers:
    """One timer for each item, with a resolution of TICK.

    The items that are due in one tick are in one set, so setting and cancelling a timer take
    constant time, and a cancelled timer leaves nothing behind, unlike in a heap.  The attribute
    `due` of an item has its tick, or None.
    """
    TICK = 0.05                         # seconds

    def __init__(self):
        self._ticks = {}                # set of items by number of the tick
        self.next = float('inf')        # no timer expires before this time

    def set(self, item, when):
        """Set the timer of `item` to a time of time.monotonic(), or cancel it (None)."""
        due, tick = item.due, when and int(when / self.TICK) + 1
        if tick == due:
            return
        if due:
            items = self._ticks[due]
            items.remove(item)
            if not items:
                del self._ticks[due]
        item.due = tick
        if tick:
            items = self._ticks.get(tick)
            if items:
                items.add(item)
            else:
                self._ticks[tick] = {item}
                if tick * self.TICK < self.next:
                    self.next = tick * self.TICK

    def expired(self, now):
        """The items whose timers have expired at the time `now`, the earliest first; their timers
        are cancelled."""
        ticks = [tick for tick in self._ticks if tick * self.TICK <= now]
        items = [item for tick in sorted(ticks) for item in self._ticks.pop(tick)]
        self.next = min(self._ticks, default=float('inf')) * self.TICK
        for item in items:
            item.due = None
        return items


class Loop:
    """An event loop: serves any number of items by one poller, in the thread that calls run().

    pool        `BlockingPool` for calls that block, or None for new threads
    costly_pool `BlockingPool` for calls that are CPU-bound, or None
    on_heavy    function of a `Tunnel` that has turned out to have heavy traffic, or None
    resolver    `Resolver`, or None

    An item is a `Task` or a `Relay`.  Its attributes and methods:

    client               `Session` that it belongs to, or None
    due                  used by `Timers`
    ready(fd, events)    a socket that the item watches is ready; `fd` is its descriptor, `events`
                         has READ and WRITE, anything else (an error, a hang-up) counts as both
    expire()             the item's timer has expired
    close(outcome)       release all resources; `outcome` is a text for the log

    Only call() and stop() may be used from other threads.

    Theory of operation.  run() works in rounds: poll, then the events, the timers, and the inbox
    of call().  An event may be out of date when its turn comes, because an earlier one of the round
    has closed its socket, or the descriptor has a new owner already.  So a descriptor that is no
    longer watched is in `_stale` up to the end of the round, and its events are skipped; those of a
    new owner are reported again by the next poll.
    """
    BUFFER = 1 << 20                    # bytes, the most that one read can return
    ROUND = 256                         # events in a round
    ROUND_TIME = 0.001                  # seconds of a round for datagrams, so that others get turns
    client = None                       # the loop is an item itself, for its waker

    def __init__(self, pool=None, on_heavy=None, resolver=None, costly_pool=None):
        self.pool = pool
        self.costly_pool = costly_pool
        self.resolver = resolver
        self.on_heavy = on_heavy
        self.items = {}                 # used as a set; a set would take twice the memory
        self.timers = Timers()
        self.now = time.monotonic()     # when this round began
        self.time_slice = self.ROUND_TIME       # seconds for one socket with datagrams
        # Unlike a bytearray, a map takes memory only for the pages that have been written to.
        private = {'flags': mmap.MAP_PRIVATE} if os.name == 'posix' else {}
        self.buffer = memoryview(mmap.mmap(-1, self.BUFFER, **private))
        self.held = 0                   # bytes that relays hold for sinks that do not take them
        self._inbox = deque()           # calls of other threads, (item, function, args)
        self._asleep = False            # the thread is in poll(), or about to be
        self._stopping = False
        self.closed = False
        self._watched = {}              # items by descriptor
        self._stale = set()             # descriptors no longer watched since the poll
        self._poller = Poller()
        try:
            self.waker = Waker()
        except OSError:                 # no descriptors left
            self._poller.close()
            raise
        self.watch(self.waker, 0, READ, self)

    def call(self, item, function, *args):
        """Have the loop call function(*args) on behalf of `item`, after the events of this round.
        """
        self._inbox.append((item, function, args))
        if self._asleep:
            self.waker.wake()

    def watch(self, sock, before, wanted, item):
        """Watch `sock` on behalf of `item` for the events `wanted`, instead of `before`.

        Both are combinations of READ, WRITE and ERRORS; 0 means not watched.  A socket must not
        stay registered for no events, since a poll would still report a hang-up, again and again.

        The caller keeps `before`, and calls this with `wanted` 0 before it closes the socket: after
        that, the entry of its descriptor would be there for the next owner of the number.
        """
        fd = sock.fileno()
        if not wanted:
            if before:
                self._poller.unregister(fd)
                del self._watched[fd]
                self._stale.add(fd)
            return
        if not before:
            self._poller.register(fd, wanted)
        elif wanted != before:
            self._poller.modify(fd, wanted)
        self._watched[fd] = item

    def run(self):
        """Serve the items until stop()."""
        timers, inbox, monotonic = self.timers, self._inbox, time.monotonic
        poll, watched, stale = self._poller.poll, self._watched, self._stale
        while not self._stopping:
            # Set before the look at the inbox: if call() comes after that look, it sees the flag
            # and wakes the poll.
            self._asleep = True
            pause = 0 if inbox else min(timers.next - monotonic(), LONGEST)
            found = poll(pause if pause > 0 else 0, self.ROUND)         # below 0 it has no end
            self._asleep = False
            self.now = monotonic()
            self.time_slice = self.ROUND_TIME / (len(found) or 1)
            for fd, events in found:
                if fd in stale:
                    continue
                item = watched[fd]
                try:
                    item.ready(fd, events)
                except Exception:
                    self.failed(item)
            if self.now >= timers.next:
                for item in timers.expired(self.now):
                    self.attempt(item, item.expire)
            for _ in range(len(inbox)):         # what these add is for the next round
                item, function, args = inbox.popleft()
                self.attempt(item, function, *args)
            if stale:
                stale.clear()
        self._stopping = False

    def stop(self):
        """Have run() return, after its current round."""
        self._stopping = True
        self.waker.wake()

    def close(self):
        """Close all items and the poller; no thread may be in run()."""
        self.closed = True
        # Items in the inbox may be on their way from another loop, and not in `items` yet.
        for item in [*(item for item, _, _ in list(self._inbox)), *self.items]:
            self.attempt(item, item.close, 'server closed')
        self._poller.close()
        self.waker.close()

    def attempt(self, item, function, *args):
        """Call function(*args) on behalf of `item`; an exception ends that item, not the loop."""
        try:
            function(*args)
        except Exception:
            self.failed(item)

    @staticmethod
    def failed(item):
        """Log the exception that `item` has raised, and close the item."""
        log.exception('%s: this is a bug', item.client and item.client.address)
        with contextlib.suppress(Exception):    # after the bug, it may be in any state
            item.close('failed: this is a bug')

    def ready(self, *_):
        """The waker is readable."""
        self.waker.clear()


class LoopItem:
    """Base of items of a `Loop` that belong to no client and hold nothing to release."""
    client = due = None

    def close(self, outcome):
        """There is nothing to close."""


class Task:
    """Runs a conversation in a loop; owns the client's socket.

    client          `Session` of the client
    sock            the client's socket, or None
    conversation    generator that yields `Wait`, `Call` and `LookUp`; it returns a `Relay`, which
                    takes the socket over, or None

    If the client resets its connection, ClientReset is raised in the conversation, whatever it
    waits for.

    Theory of operation.  The conversation waits either for sockets (`_awaited`, else NOTHING) or
    for a result from another thread (`_call`, else None).  A result counts only while `_call` is
    still the call that it is for: after a timeout or a close, it comes too late and is dropped.
    The client's socket stays watched between two waits for the same event, which saves system
    calls.  Other sockets are watched only during the wait, because the conversation may close them.
    """
    __slots__ = ('client', 'loop', 'due', '_sock', '_events', '_others', '_conversation',
                 '_awaited', '_call')
    NOTHING = Wait()

    def __init__(self, client, sock, conversation):
        self.client = client
        self.due = None
        self._sock = sock
        self._events = 0                # events that `_sock` is watched for
        self._others = []               # other sockets that are watched
        self._conversation = conversation       # None after its end
        self._awaited = self.NOTHING    # the `Wait`
        self._call = None               # the `Call` or `LookUp` that other threads work on

    traffic = 0, 0                      # as of a relay, for the table of clients

    def start(self, loop):
        """Begin the conversation in `loop`."""
        self.loop = loop
        loop.items[self] = True
        self._step(self._conversation.send, None)

    def ready(self, fd, _):
        awaited = self._awaited
        for sock in (*awaited.reading, *awaited.writing):
            if sock.fileno() == fd:
                return self._step(self._conversation.send, [sock])
        if self._conversation and self._sock.fileno() == fd:
            error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._step(self._conversation.throw, ClientReset(os.strerror(error)))
            else:                       # data or an end of data, to be read later
                self._watch_own(ERRORS)

    def expire(self):
        if not self._conversation:      # ended earlier in this round
            return
        if self._call:
            self._step(self._conversation.throw, socket.timeout('timed out'))
        else:
            self._step(self._conversation.send, [])

    def close(self, outcome):
        """Raise OSError(ECANCELED) in the conversation; if it goes on after that, end it.

        So it can send a last reply to the client, but cannot wait for anything.
        """
        if self._conversation:
            with contextlib.suppress(Exception):        # all others have to be closed, too
                self._step(self._conversation.throw, OSError(errno.ECANCELED, outcome))
        if self._conversation:
            self._unwatch()
            self._conversation.close()
            self._end(None)

    def _step(self, advance, value):
        """Resume the conversation by advance(value), and begin to wait for what it yields."""
        if self._others:
            self._unwatch()
        self._awaited, self._call = self.NOTHING, None
        try:
            awaited = advance(value)
        except StopIteration as stop:
            return self._end(stop.value)
        if awaited.until or self.due:
            self.loop.timers.set(self, awaited.until)
        if isinstance(awaited, Wait):
            self._awaited = awaited
        else:
            self._call = awaited
            try:
                self._delegate(awaited)
            except RuntimeError as error:           # no thread is available
                return self._step(self._conversation.throw, OSError(errno.EAGAIN, str(error)))
        own = self._sock
        for sockets, wanted in (self._awaited.reading, READ), (self._awaited.writing, WRITE):
            for sock in sockets:
                if sock is not own:
                    self.loop.watch(sock, 0, wanted, self)
                    self._others.append(sock)
                elif wanted != self._events:
                    self.loop.watch(own, self._events, wanted, self)
                    self._events = wanted
        if ERRORS and not self._events and self._conversation and self._sock:
            self._watch_own(ERRORS)     # to notice a reset during the wait

    def _delegate(self, call):
        """Give a `Call` or `LookUp` to another thread; RuntimeError if none is available."""
        owner = self.client.key
        if isinstance(call, LookUp) and self.loop.resolver:
            self.loop.resolver.ask(owner, self, call)
        elif not self.loop.pool or call.worker is Worker.OWN:
            threading.Thread(target=self._work, args=(call,), name='socks-handler',
                             daemon=True).start()
        elif call.worker is Worker.COSTLY:
            self.loop.costly_pool.run(owner, self._work, call)
        else:
            self.loop.pool.run(owner, self._work, call)

    def _work(self, call):
        """Do a `Call`, in a thread of the pool or in one of its own."""
        if self.is_waiting_for(call):   # it may have waited for a thread for too long
            value = error = None
            try:
                value = call.function()
            except Exception as caught:
                error = caught
            self.answer(call, value, error)

    def is_waiting_for(self, call):
        """Whether the conversation still waits for the result of `call`; for any thread."""
        return call is self._call

    def answer(self, call, value=None, error=None):
        """Have the loop resume the conversation with the result of `call`, or with its error.

        Any thread may call this.
        """
        self.loop.call(self, self._resume, call, value, error)

    def _resume(self, call, value, error):
        if call is not self._call:
            if isinstance(value, socket.socket):        # too late, and now without an owner
                value.close()
            return
        if error:
            self._step(self._conversation.throw, error)
        else:
            self._step(self._conversation.send, value)

    def _watch_own(self, wanted):
        self.loop.watch(self._sock, self._events, wanted, self)
        self._events = wanted

    def _unwatch(self):
        while self._others:             # READ stands for whatever each was watched for
            self.loop.watch(self._others.pop(), READ, 0, self)

    def _end(self, relay):
        self._conversation = None
        loop = self.loop
        if self.due:
            loop.timers.set(self, None)
        if relay:
            try:
                relay.start(loop, self._events)
            except Exception:
                loop.failed(relay)
        else:
            loop.watch(self._sock, self._events, 0, self)
            self._sock.close()
        loop.items.pop(self, None)      # last, since flush_at_exit() looks from another thread


class Errand(Task):
    """A conversation on behalf of a relay, in the relay's loop.

    It has no socket of its own, and its result is ignored.  `relay.errands` has the errands that
    have not ended; the relay cancels them when it closes.
    """
    __slots__ = ('_relay',)

    def __init__(self, relay, conversation):
        super().__init__(relay.client, None, conversation)
        self._relay = relay

    def start(self, loop):
        self.loop = loop
        self._relay.errands.add(self)
        self._step(self._conversation.send, None)

    def close(self, outcome):           # after a bug: the relay cannot go on without its errand
        self._relay.close(outcome)

    def cancel(self):
        """End the conversation at once."""
        self._unwatch()
        self._call = None
        self._conversation.close()
        self._end(None)

    def _end(self, _):
        self._conversation = None
        self.loop.timers.set(self, None)
        self._relay.errands.discard(self)


class Share:
    """The jobs of one owner in a `BlockingPool`."""
    __slots__ = ('under_way', 'limit', 'places', 'waiting')

    def __init__(self, limit):
        self.under_way = 0              # jobs that have a thread
        self.limit = limit              # of those
        self.places = {}                # ticks since jobs began, by number; None if not yet
        self.waiting = deque()          # jobs that wait for one


class BlockingPool:
    """A pool of threads for calls that block, shared fairly between owners.

    size        number of threads at most; they are started when needed
    patience    seconds after which a thread without a job ends

    An owner is any hashable value, such as the key of a client.  It may have 3 * (F - N / 8)
    threads, of N of which F are free: the last eighth is kept for owners without a thread.
    So one owner alone gets most of the threads, several get equal shares in the long run, and the
    first job of a new owner finds a thread.

    Many threads that compete for the interpreter lock hold up the loops.  So an owner has PLACES
    for jobs that may use the processor.  A job that takes longer than STAY ticks, or one while the
    process is idle, is taken to wait for the network, and leaves its place.

    Theory of operation.  A job is first in `waiting` of its owner's `Share`, then, as soon as the
    owner may have one more thread, in `_ready`, where any free thread takes it.  It is counted in
    `_taken` and `under_way` from then on up to its end.  All state is guarded by `_changed`.  As
    long as jobs wait, a further thread, `_watcher`, finds the jobs that leave their places.
    """
    LONGEST_QUEUE = 1024                # jobs of one owner that may wait
    PLACES = 2                          # of one owner
    STAY = 10                           # ticks
    TICK = 0.005                        # seconds

    def __init__(self, size=256, patience=5.0):
        self.size = size
        self._patience = patience
        self._changed = threading.Condition()
        self._threads = set()
        self._ready = deque()           # jobs for the next free threads, (owner, number, job)
        self._numbers = itertools.count()
        self._taken = 0                 # number of jobs that have a thread or are ready
        self._shares = {}               # `Share` by owner
        self._turns = deque()           # owners with waiting jobs, in the order of their turns
        self._watcher = None            # thread, or None
        self._closed = False

    def run(self, owner, *job, limit=float('inf'), at_once=False):
        """Call job[0](*job[1:]) in a thread of the pool; return at once.

        limit      number of the owner's jobs that may run at a time
        at_once    refuse the job if it would have to wait for a thread; it needs no place

        Raises RuntimeError if the job is refused, if too many jobs of the owner wait, or if no
        thread can be started.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError('the server is closed')
            share = self._shares.get(owner) or Share(limit)
            if (not self._may_have_thread(share) if at_once
                    else len(share.waiting) >= self.LONGEST_QUEUE):
                raise RuntimeError('too many jobs wait for a thread')
            self._shares[owner] = share
            if at_once:
                self._make_ready(owner, share, job)
            else:
                self._queue(owner, share, job)
            self._changed.notify()
            try:
                self._start_threads()
            except RuntimeError:
                if not self._threads:   # else one of them will take the job
                    self._done(*self._ready.pop())
                    raise

    def _queue(self, owner, share, job):
        """Have a job wait for its owner's turn, which may have come already."""
        if not share.waiting:
            # An owner without a thread comes before those that have some.
            (self._turns.append if share.under_way else self._turns.appendleft)(owner)
        share.waiting.append(job)
        self._distribute()

    def _make_ready(self, owner, share, job):
        """Give a job to the next free thread; returns its number."""
        number = next(self._numbers)
        share.under_way += 1
        self._taken += 1
        self._ready.append((owner, number, job))
        return number

    def _may_have_thread(self, share):
        """Whether the owner of `share` may have one more thread, by the rule of the class."""
        left = self.size - self._taken
        if not share.under_way:
            return left > 0
        return share.under_way < min(share.limit, 3 * (left - self.size // 8))

    def _distribute(self):
        """Make waiting jobs ready, one of each owner, as far as there are threads for them.

        Returns whether there were any.
        """
        before = self._taken
        for _ in range(len(self._turns)):
            if self._taken >= self.size:
                break
            owner = self._turns.popleft()
            share = self._shares[owner]
            if len(share.places) < self.PLACES and self._may_have_thread(share):
                number = self._make_ready(owner, share, share.waiting.popleft())
                share.places[number] = None
            if share.waiting:
                self._turns.append(owner)
        return self._taken > before

    def _start_threads(self):
        """Start a thread for each job that has none, and a watcher if jobs wait."""
        while self._taken > len(self._threads):
            thread = threading.Thread(target=self._work, name='socks-pool', daemon=True)
            thread.start()
            self._threads.add(thread)
        if self._turns and not self._watcher:
            watcher = threading.Thread(target=self._watch, name='socks-pool-watcher', daemon=True)
            watcher.start()
            self._watcher = watcher

    def _watch(self):
        """Have jobs that take long leave their places, as long as others wait for these."""
        while True:
            began, used = time.monotonic(), time.process_time()
            time.sleep(self.TICK)
            with self._changed:
                is_idle = (time.process_time() - used < self.TICK / 4
                           and time.monotonic() - began < 1.5 * self.TICK)  # no wait for the lock
                for owner in self._turns:
                    self._tick(self._shares[owner].places, 1 if is_idle else self.STAY)
                while self._distribute():
                    pass
                self._changed.notify(len(self._ready))
                with contextlib.suppress(RuntimeError):         # then the threads do them all
                    self._start_threads()
                if not self._turns:
                    self._watcher = None
                    return

    @staticmethod
    def _tick(places, stay):
        """Count a tick of the jobs that have begun; those with `stay` ticks leave their places."""
        # Ticks are late when threads compete, so a job that lacks the CPU keeps its place.
        for number, ticks in list(places.items()):
            if ticks is not None:
                places[number] += 1
                if ticks >= stay:
                    del places[number]

    def _work(self):
        """Do jobs, in a thread of the pool, until there is none for a while."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._closed, self._patience)
                # The thread leaves `_threads` under the lock under which jobs are added, so run()
                # either finds it waiting or starts another one, and no job is lost.
                if self._closed or not self._ready:
                    return self._threads.discard(threading.current_thread())
                owner, number, job = self._ready.popleft()
                places = self._shares[owner].places
                if number in places:
                    places[number] = 0
            try:
                job[0](*job[1:])
            except Exception:
                log.exception('this is a bug')
            with self._changed:
                self._done(owner, number, job)
                self._distribute()
                self._changed.notify(max(0, len(self._ready) - 1))      # this thread takes one
                with contextlib.suppress(RuntimeError):         # then this thread does them all
                    self._start_threads()
            job = None                  # its objects must not live on while the thread waits

    def _done(self, owner, number, _):
        """Count a job as ended."""
        share = self._shares[owner]
        share.places.pop(number, None)
        share.under_way -= 1
        self._taken -= 1
        if not (share.under_way or share.waiting):
            del self._shares[owner]

    def dismiss(self):
        """Have all threads end after their current jobs; jobs that wait are dropped."""
        with self._changed:
            self._closed = True
            self._turns.clear()
            self._changed.notify_all()


HOSTS_FILE = r'C:\Windows\System32\drivers\etc\hosts' if os.name == 'nt' else '/etc/hosts'
RESOLV_CONF = '/etc/resolv.conf'
TOGETHER = (socket.AF_UNSPEC,)                          # one look-up for both


def modification_time(path):
    """The time when a file was last modified, in ns; None if there is no such file."""
    with contextlib.suppress(OSError):          # as of any file that cannot be read
        return os.stat(path).st_mtime_ns
    return None


@functools.lru_cache(1)
def hosts_file_names(path, _):
    """The set of the names in a hosts file (hosts(5)), as bytes in lower case.

    The second argument is the file's modification time, so that a changed file is read again.
    """
    names = set()
    with contextlib.suppress(OSError), open(path, 'rb') as file:        # there may be no file
        for line in file:
            names.update(line.lower().partition(b'#')[0].split()[1:])
    return names


@functools.lru_cache(1)
def has_search_list(path, _):
    """Whether the system may append domains to names that it looks up (resolv.conf(5)).

    The second argument is the file's modification time, as in hosts_file_names().
    """
    # Without a "search" line, the search list is the domain of the host's own name.
    if '.' in socket.gethostname() or os.name != 'posix':
        return True
    # Without the file, the name server is on this host, and there is no list.
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        return any(re.match(br'(search|domain)\s+[^\s.]', line) for line in file)
    return False


def look_up_plan(name, is_strict):
    """The steps for looking a name up, a list of (name, families); the first with a result counts.

    Each family takes a look-up of its own, TOGETHER stands for a single one for both.

    A name in the hosts file takes one step for both families, since the file overrides DNS for
    both.  If a search list may apply, the two families could be found under different domains, so
    a name with a dot is tried as an absolute name first, and then with one look-up for both.

    is_strict    use no search list
    """
    plain, has_dot = name.rstrip('.'), '.' in name
    if (plain == 'localhost'
            or plain.encode() in hosts_file_names(HOSTS_FILE, modification_time(HOSTS_FILE))):
        return [(plain, TOGETHER)]
    if not (is_strict and not has_dot
            or has_search_list(RESOLV_CONF, modification_time(RESOLV_CONF))):
        return [(name, IP_FAMILIES)]
    steps = [(plain + '.', IP_FAMILIES)] if has_dot or is_strict else []
    return steps if is_strict or name != plain else [*steps, (name, TOGETHER)]


# IPv6 networks with lower precedence than IPv4 (RFC 6724 section 2.1): Teredo, 6to4, unique local.
AFTER_IPV4 = [ipaddress.ip_network(network)
              for network in ('2001::/32', '2002::/16', 'fc00::/7')]


def preferred(hosts):
    """The IP addresses `hosts` in the order in which to try them, at most ATTEMPTS of them.

    The families alternate (RFC 8305 section 4).  IPv6 comes first if this host has a route for it,
    unless the local or the remote address is in AFTER_IPV4.
    """
    v4, v6 = ([host for host in hosts if (':' in host) == is_v6] for is_v6 in (False, True))
    if v4 and v6:
        with contextlib.suppress(OSError):              # there is no route
            ends = [ipaddress.ip_address(host) for host in (v6[0], local_ip_towards(v6[:1], ()))]
            if not any(end in network for end in ends for network in AFTER_IPV4):
                return in_turn(v6, v4)[:ATTEMPTS]
    return in_turn(v4, v6)[:ATTEMPTS]


class Query:
    """The look-up of one name, and the tasks that wait for it."""
    __slots__ = ('name', 'key', 'memory', 'owners', 'waiting', 'is_renewal', 'steps', 'missing',
                 'found', 'failures', 'complete', 'answered')

    def __init__(self, name, key, memory, is_renewal):
        self.name = name
        self.key = key                  # the name; (owner, name) if it is the owner's alone
        self.memory = memory            # dictionary for the answer
        self.owners = set()             # owners that have a job for it in the pool
        self.waiting = []               # (task, its `LookUp`)
        self.is_renewal = is_renewal    # there is an answer that may still be used
        self.steps = None               # steps left of its plan; None: not begun
        self.missing = set()            # families of the current step without a result
        self.found = {}                 # IP addresses by family
        self.failures = []              # (class, errno, text) for each look-up without addresses
        self.complete = threading.Event()       # set when no family is missing
        self.answered = None            # time of the answer

    def put_off(self):
        """The look-ups of one family that have become steps of their own, a list of (name, family).
        """
        return [(name, families[0]) for name, families in self.steps
                if len(families) < len(IP_FAMILIES) and families != TOGETHER]


class Answer(NamedTuple):
    """The remembered result of a look-up: IP addresses, or why there are none."""
    hosts: Sequence
    failure: Optional[Tuple]            # (class of the error, errno, text), or None
    renewal: float                      # time from which a request starts a new look-up
    end: float                          # time until which the answer may be used


class Resolver:
    """Finds the IP addresses of names by the system's resolver, in the threads of `pool`.

    is_strict    use no search list, see look_up_plan()

    Theory of operation.  All tasks that ask for a name at the same time share one `Query`.  It has
    one look-up for each family, in parallel (RFC 8305 section 3).  The first thread that finds
    addresses waits for the other family, for DELAY at most, then answers all tasks.  Addresses that
    come later only complete the remembered answer.  An answer is remembered for MEMORY; a request
    in the second half of that time renews it in the background.

    Some name servers never answer for one family.  So a family that was late LATE times in
    succession is no longer waited for, and one of its look-ups at a time is in parallel; the others
    follow when the tasks have been answered.  This is counted for each owner, who may ask for names
    of its own zone; and an owner with a late family has queries and answers of its own, so that it
    takes no family from others.
    """
    DELAY = 0.05                        # seconds, RFC 8305 section 8
    LATE = 3                            # times
    FOLLOWING = 16                      # look-ups that follow an answer, of one owner at a time
    MEMORY = 60.0                       # seconds to remember addresses; getaddrinfo has no TTL
    RETRY = 3.0                         # seconds to remember a failure
    LIMIT = 1024                        # names to remember, and late families

    def __init__(self, pool):
        self.pool = pool
        self.is_strict = False
        self._lock = threading.Lock()
        self._answers = {}              # `Answer` by key of its `Query`, the latest one last
        self._queries = {}              # `Query` by key
        self._late = {}                 # how many answers in a row were late, by (owner, family)
        self._busy = {}                 # look-ups under way, by (owner, family)

    def ask(self, owner, task, awaited):
        """Have task.answer() called with the result of `awaited`, a `LookUp`.

        The look-up is a job of `owner` in the pool.  Raises RuntimeError if no thread is available.
        """
        with self._lock:
            is_hasty = any(self._is_late(owner, family) for family in IP_FAMILIES)
            key = (owner, awaited.name) if is_hasty else awaited.name
            answer, query = self._answers.get(key), self._queries.get(key)
            now = time.monotonic()
            is_known = answer is not None and now < answer.end
            if is_known:
                self._deliver(task, awaited, answer)
                if query or now < answer.renewal:
                    return
            if not query:
                query = self._queries[key] = Query(awaited.name, key, self._answers, is_known)
            if not is_known:
                query.waiting.append((task, awaited))
            # A query that has not begun may be far back in the queue of another owner.  It becomes
            # a job of this owner too; whichever job comes first does it.
            if query.steps is not None or owner in query.owners:
                return
            query.owners.add(owner)
            try:
                self.pool.run(owner, self._begin, query, owner)
            except RuntimeError:
                self._withdraw(query, owner, (task, awaited))
                if not is_known:        # else there was an answer, which was to be renewed
                    raise

    def _withdraw(self, query, owner, waiting):
        """Undo what ask() did for a job that the pool has refused."""
        query.owners.discard(owner)
        if waiting in query.waiting:
            query.waiting.remove(waiting)
        if not query.owners:
            del self._queries[query.key]

    def _is_late(self, owner, family):
        return self._late.get((owner, family), 0) >= self.LATE

    def _count_late(self, owner, family):
        self._late[owner, family] = self._late.pop((owner, family), 0) + 1
        if len(self._late) > self.LIMIT:
            del self._late[next(iter(self._late))]

    @staticmethod
    def _deliver(task, awaited, answer):
        """Give an `Answer` to a task, with an exception of its own if it is a failure."""
        error = None
        if not answer.hosts:
            kind, *args = answer.failure
            error = kind(*args)
        task.answer(awaited, answer.hosts, error)

    # What follows runs in threads of the pool.

    def _begin(self, query, owner):
        """Start the first step, unless another job did, or no task waits any more."""
        plan = look_up_plan(query.name, self.is_strict)
        with self._lock:
            if query.steps is not None:
                return
            query.steps = deque(plan)
            # The tasks may have timed out in the queue: clients that have left cost no look-up.
            if not (query.is_renewal
                    or any(task.is_waiting_for(awaited) for task, awaited in query.waiting)):
                return self._remove(query)
        self._take_step(query, owner)

    def _remove(self, query):
        if self._queries.get(query.key) is query:       # after forget() there may be another one
            del self._queries[query.key]

    def _take_step(self, query, owner):
        """Look up all families of the next step: one in this thread, others in further threads."""
        with self._lock:
            name, families = query.steps.popleft()
            # A look-up of a late family may occupy its thread for long, so only one runs at a
            # time; that of this query becomes a step of its own, after the quick family.
            slow = [family for family in families
                    if query.key != query.name and (owner, family) in self._busy
                    and self._is_late(owner, family)]
            if len(slow) < len(families):
                query.steps.extendleft((name, (family,)) for family in slow)
                families = [family for family in families if family not in slow]
            query.missing = set(families)
            query.complete.clear()
        for family in families[1:]:
            try:
                self.pool.run(owner, self._look_up, query, owner, name, family, at_once=True)
            except RuntimeError:        # no thread is free: a step of its own, after this one
                with self._lock:
                    query.missing.discard(family)
                    query.steps.appendleft((name, (family,)))
        self._look_up(query, owner, name, families[0])

    def _look_up(self, query, owner, name, family):
        """Look one family up; answer the tasks if this is the first result, or the last failure."""
        since = time.monotonic()
        # It follows an answer, see _finish(), and has waited for a thread until that was forgotten.
        if query.answered and since > query.answered + self.MEMORY:
            return
        with self._lock:
            self._busy[owner, family] = self._busy.get((owner, family), 0) + 1
        hosts, failure = self._outcome(name, family)
        with self._lock:
            self._busy[owner, family] -= 1
            if not self._busy[owner, family]:
                del self._busy[owner, family]
            # In time: before the answer, or, as one that followed it, as fast as that.
            if not query.answered or time.monotonic() - max(since, query.answered) < self.DELAY:
                self._late.pop((owner, family), None)
            is_first, is_last = self._note(query, family, hosts, failure)
            is_hasty = query.key != query.name and all(
                self._is_late(owner, each) for each in query.missing)
        if is_first:
            if not is_last and not is_hasty:
                query.complete.wait(self.DELAY)
            self._finish(query, owner)
        elif is_last and not query.found:
            if query.steps:
                self._take_step(query, owner)
            else:
                self._finish(query, owner)

    @staticmethod
    def _outcome(name, family):
        """(IP addresses of a name, None), or ([], (class, errno, text)) if there are none.

        The class is socket.gaierror for what the system says about the name, and OSError for what
        says nothing about it, such as a lack of descriptors.
        """
        try:
            return hosts_of(name, family), None
        except socket.gaierror as error:
            return [], (socket.gaierror, error.errno, reason(error))
        except OSError as error:
            if error.errno in NO_ROOM:
                return [], (OSError, error.errno, error.strerror)
            return [], (socket.gaierror, socket.EAI_FAIL, reason(error))
        except Exception:
            log.exception('this is a bug')
            return [], (OSError, errno.EIO, 'the look-up failed')

    def _note(self, query, family, hosts, failure):
        """Record the outcome for a family.

        Returns (is it the first family with addresses, has every family of the step a result).
        """
        query.missing.discard(family)
        if hosts:
            query.found[family] = hosts
        else:
            query.failures.append(failure)
        if not query.missing:
            query.complete.set()
        if query.answered and hosts:    # too late for the tasks that asked, in time for the next
            self._remember(query, self._answer(query, query.answered))
        return bool(hosts) and len(query.found) == 1, not query.missing

    def _finish(self, query, owner):
        """Answer all tasks that wait, with what has been found; look up the families put off."""
        with self._lock:
            query.answered = time.monotonic()
            for family in query.missing:
                self._count_late(owner, family)
            answer = self._answer(query, query.answered)
            self._remember(query, answer)
            self._remove(query)
            waiting, query.waiting = query.waiting, []
            put_off = query.put_off() if query.found else ()
            query.steps.clear()
        for task, awaited in waiting:
            self._deliver(task, awaited, answer)
        for name, family in put_off:
            with contextlib.suppress(RuntimeError):     # too many wait
                self.pool.run((owner, 'following'), self._look_up, query, owner, name, family,
                              limit=self.FOLLOWING)

    def _answer(self, query, now):
        """The `Answer` of a query with what it has found by the time `now`.

        If a look-up says nothing about the name, or found no thread, the next request starts a new
        one.
        """
        is_sound = (all(kind is socket.gaierror for kind, *_ in query.failures)
                    and (query.key != query.name or not query.put_off()))
        if query.found:
            hosts = preferred(list(itertools.chain(*query.found.values())))
            renewal = now + self.MEMORY / 2 if is_sound else now
            return Answer(hosts, None, renewal, now + self.MEMORY)
        # "No such name" says less than a name server that failed: the name may exist.
        failure = min(query.failures, key=lambda failure: (failure[0] is socket.gaierror,
                                                           failure[1] in NO_SUCH_NAME))
        end = now + self.RETRY if is_sound else now
        return Answer((), failure, end, end)

    @classmethod
    def _remember(cls, query, answer):
        """Store the answer of a query, unless there is a better one; the oldest makes room."""
        memory, key = query.memory, query.key
        before = memory.pop(key, None)
        if before and before.hosts and before.end > answer.end:
            # The renewal failed, or a later query has finished before.  Keep the old addresses.
            answer = before._replace(renewal=max(before.renewal, answer.renewal))
        if len(memory) >= cls.LIMIT:
            del memory[next(iter(memory))]
        memory[key] = answer

    def forget(self):
        """Drop all answers; queries under way keep their tasks, but are not remembered."""
        with self._lock:
            self._answers, self._queries = {}, {}


# ----------------------------------------------------------------------------------------- relays

class Relay:
    """Base of what serves a client in a loop after the conversation; owns its sockets.

    client         `Session` of the client; None after the end
    patience       seconds without data after which the relay ends; 0: no limit
    last_active    time of the last data
    """
    __slots__ = ('client', 'loop', 'due', 'last_active')

    def attach(self, loop):
        """Become an item of `loop`."""
        self.loop = loop
        self.last_active = loop.now
        loop.items[self] = True
        self.expire()

    def detach(self):
        """Be an item of no loop."""
        if self.due:
            self.loop.timers.set(self, None)
        self.loop.items.pop(self, None)


def seconds_since_sent(sock):
    """Seconds since the system last sent data on a TCP socket (tcp(7)); infinity if unknown."""
    with contextlib.suppress(OSError):          # a unix socket has no such option
        if sys.platform == 'linux':
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 48)
            return struct.unpack_from('=I', info, 44)[0] / 1000         # tcpi_last_data_sent, ms
    return float('inf')


# TCP keep-alive for half-closed connections (tcp(7)): seconds of silence before the first probe,
# and between probes.
PROBES = [(getattr(socket, name), seconds) for name, seconds in (
    ('TCP_KEEPIDLE', 30), ('TCP_KEEPALIVE', 30), ('TCP_KEEPINTVL', 15)) if hasattr(socket, name)]


class Spill:
    """Takes the place of a sink that has failed, and discards up to 4096 bytes."""

    def __init__(self):
        self._room = 4096

    def send(self, data):
        self._room -= len(data)
        if self._room < 0:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return len(data)

    def shutdown(self, _):
        """As of a socket; there is nothing to do."""


class Pipe:
    """One direction of a `Tunnel`: copies from the socket `source` to the socket `sink`.

    load    bytes that the sink did not take yet
    done    the source has ended, or the sink has failed

    Theory of operation.  While `load` is empty, the pipe waits until it can read from the source.
    While `load` is not empty, it waits until it can write to the sink and reads nothing, so memory
    is bounded and the sender is slowed down.

    A tunnel has two sockets and two pipes, each the other's `twin`: the source of one is the sink
    of the other.  An event of a socket concerns both pipes, but a loop has one item for a
    descriptor.  So each pipe watches its source: for reading on its own behalf, for writing on
    behalf of its twin.

    A pipe ends in one of two ways.

    end(): the source has ended.  The sink's direction is shut down, and the twin goes on.

    sink_failed(): the sink takes no more data.  This is not yet an error, because a peer that has
    sent all often closes its socket at once, and then refuses what the other side sends at its own
    end, such as TLS's close_notify.  So the pipe reads on, into a `Spill`.  If its source then ends
    too, the tunnel is done.  It is an error if the sink's side had not ended, or if the source does
    not end within Tunnel.GRACE or sends more than the `Spill` takes; then both sides get an RST.
    """
    # `size`, the limit of one read, grows while the source fills it: few large system calls make
    # the copying fast.  It is small at first, after the sink did not take all, and while the loop
    # holds more than HELD bytes, so that many slow sinks cannot use up the memory.
    SMALLEST, LARGEST = 1 << 14, Loop.BUFFER        # bytes
    HELD = 1 << 26                                  # bytes

    __slots__ = ('tunnel', 'source', 'sink', 'twin', 'load', 'done', 'size', 'count', 'events')

    def __init__(self, tunnel, source, sink, load=b''):
        self.tunnel = tunnel
        self.source = source
        self.sink = sink
        self.twin = None                # the other direction
        self.load = load
        self.done = False
        self.size = self.SMALLEST
        self.count = len(load)          # bytes read from the source
        self.events = 0                 # events that the loop watches the source for

    @property
    def client(self):
        """The tunnel's `Session`, for Loop.failed()."""
        return self.tunnel.client

    def ready(self, _, events):
        """Handle `events` of the source, which is also the twin's sink."""
        # An earlier event of the round may have changed `self.events`.  An error or a hang-up
        # (neither READ nor WRITE) counts as both: the next read or write tells what it is.
        if self.events & READ and events & ~WRITE:
            self.fill()
        elif self.events == ERRORS:
            # SO_ERROR is cleared by reading it, so what it says must not be lost (socket(7)).
            error = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self.twin.sink_failed(OSError(error, os.strerror(error)))
        if self.events & WRITE and events & ~READ:
            self.twin.flush()

    def fill(self):
        """Read once from the source, and write the data to the sink."""
        tunnel = self.tunnel
        loop = tunnel.loop
        try:
            count = self.source.recv_into(
                loop.buffer, self.size if loop.held < self.HELD else self.SMALLEST)
        except BLOCKED:
            return
        except OSError as error:
            return tunnel.close(tunnel.fault_of(self.source, error))
        if not count:
            return self.end()
        tunnel.last_active = loop.now
        self.count += count
        if count == self.size < self.LARGEST:
            self.grow()
        # At once, without a poll: the sink almost always takes it, which saves a round of the loop.
        data, sent = loop.buffer[:count], 0
        try:
            sent = self.sink.send(data)
        except BLOCKED:
            pass
        except OSError as error:
            return self.sink_failed(error)
        if sent < count:
            self.size = self.SMALLEST
            self.keep(memoryview(bytes(data[sent:])))   # a copy: all pipes share the loop's buffer
            tunnel.watch()

    def grow(self):
        """Read more at a time; heavy traffic may move the tunnel to another loop."""
        self.size *= 4
        loop = self.tunnel.loop
        if self.size == self.LARGEST and loop.on_heavy:
            loop.call(self.tunnel, loop.on_heavy, self.tunnel)      # later: this one is in fill()

    def flush(self):
        """Send what `load` or a TLS layer holds for the sink."""
        if self.load:
            self.tunnel.last_active = self.tunnel.loop.now
            try:
                self.keep(self.load[self.sink.send(self.load):])
            except BLOCKED:
                pass
            except OSError as error:
                return self.sink_failed(error)
            self.tunnel.watch()
        elif getattr(self.sink, 'unsent', False):       # only a `Layer` has that
            try:
                self.sink.flush()
            except OSError as error:
                return self.sink_failed(error)
            self.tunnel.watch()

    def keep(self, load):
        """Set `load`, and count its bytes in the loop."""
        self.tunnel.loop.held += len(load) - len(self.load)
        self.load = load or b''         # an empty view would keep all of its memory alive

    def end(self):
        """The source has ended: shut the sink down for writing.  The twin goes on (half-close)."""
        self.done = True
        tunnel, twin = self.tunnel, self.twin
        if twin.done or tunnel.fault:   # the fault: a reset that came while there was a load
            return tunnel.close(tunnel.fault or 'done')
        tunnel.last_active = tunnel.loop.now
        try:
            self.sink.shutdown(socket.SHUT_WR)
        except OSError:                 # closed by its peer, which the twin notices
            pass
        patience = tunnel.patience      # may be shorter now
        if patience:
            tunnel.loop.timers.set(tunnel, tunnel.last_active + patience)
        tunnel.watch()

    def sink_failed(self, error):
        """The sink takes no more data; see the class.  The twin reads what it has sent before."""
        tunnel = self.tunnel
        self.keep(b'')
        fault = tunnel.fault_of(self.twin.source, error)
        if isinstance(self.sink, Spill):
            self.done, tunnel.fault = True, tunnel.sink_failure
        else:
            # EPIPE means that the peer has closed in order: its end will be read, if not yet.
            if not (self.twin.done or isinstance(error, BrokenPipeError)):
                tunnel.fault = fault
            self.sink, tunnel.sink_failure = Spill(), fault
            tunnel.last_active = tunnel.loop.now
            tunnel.expire()
        tunnel.watch()

    def close(self, outcome):
        self.tunnel.close(outcome)


@functools.lru_cache(maxsize=None)
def system_splice():
    """The system's function splice(source, sink, size), which moves bytes between two descriptors
    (splice(2)), or None.  By ctypes where `os` has none: before Python 3.10, and in PyPy."""
    flags = 1 | 2                       # SPLICE_F_MOVE | SPLICE_F_NONBLOCK
    if hasattr(os, 'splice'):
        return functools.partial(os.splice, flags=flags)
    try:
        import ctypes                   # here, since it is seldom needed
        function = ctypes.CDLL(None, use_errno=True).splice
    except (ImportError, OSError, AttributeError, TypeError):       # not Linux
        return None
    function.restype = ctypes.c_ssize_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p] * 2 + [ctypes.c_size_t, ctypes.c_uint]

    def splice(source, sink, size):
        count = function(source, None, sink, None, size, flags)
        if count < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return count
    return splice


class SystemPipes:
    """Empty pipes for `SplicePipe`, at most LIMIT at a time; one that is given back is used again.

    An unprivileged user may have 64 MiB of pipes in all processes together, and gets tiny ones
    beyond that (pipe(7)), so this is only a part of it.  take() and give_back() may be called by
    any thread.
    """
    LIMIT = 16
    SIZE = 1 << 20                      # bytes; with 256 KiB splicing costs more than copying
    F_SETPIPE_SZ = 1031                 # fcntl(2); `fcntl` has it from Python 3.10 on

    def __init__(self):
        self._free = deque([None] * self.LIMIT)         # None: not made yet

    def take(self):
        """The descriptors (to read, to write) of an empty pipe, or None."""
        if not system_splice():
            return None
        try:
            ends = self._free.pop()
        except IndexError:
            return None
        try:
            if not ends:
                ends = os.pipe()
                fcntl.fcntl(ends[1], self.F_SETPIPE_SZ, self.SIZE)
            return ends
        except OSError:                 # no descriptor, or no memory for pipes
            self.give_back(ends, is_empty=False)
            return None

    def give_back(self, ends, is_empty):
        """End the use of a pipe; one that is not empty is closed."""
        if ends and not is_empty:
            os.close(ends[0])
            os.close(ends[1])
            ends = None
        self._free.append(ends)

    def close(self):
        """Close all pipes that are not in use."""
        for _ in range(len(self._free)):
            self.give_back(self._free.popleft(), is_empty=False)


class SplicePipe(Pipe):
    """A `Pipe` whose bytes stay in the kernel while the traffic is heavy: splice(2) moves them,
    through a system pipe.

    What the sink has not taken stays in the system pipe.  `load` is a range of that length then,
    which has all that `Pipe` and `Tunnel` ask of a load: a length, and to be cut at its beginning.
    """
    CALM = 64                           # small reads in a row after which it copies again
    # splice(2) is not for these descriptors, or is forbidden (seccomp): copying may still work.
    UNABLE = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOMEM}

    __slots__ = ('_pipes', '_ends', '_small', '_is_done')

    def __init__(self, pipe, pipes):
        """Take the place of `pipe`, which no loop watches; `pipes` is a `SystemPipes`."""
        self._pipes, self._ends, self._small = pipes, None, 0
        super().__init__(pipe.tunnel, pipe.source, pipe.sink, pipe.load)
        self.count, self.size, self.done = pipe.count, pipe.size, pipe.done
        if self.size == self.LARGEST and not self.done:
            self._take()

    @property
    def done(self):
        return self._is_done

    @done.setter
    def done(self, is_done):            # set by everything that ends a pipe
        self._is_done = is_done
        if is_done:
            self._copy()

    def _take(self):
        if not isinstance(self.sink, Spill):
            self._ends, self._small = self._pipes.take(), 0

    def _copy(self):
        """Copy from now on, until reads are large again."""
        if self._ends:
            self._pipes.give_back(self._ends, is_empty=not self.load)
            self._ends, self.size = None, self.SMALLEST

    def grow(self):
        super().grow()
        if self.size == self.LARGEST and not self._ends:
            self._take()

    def fill(self):
        if not self._ends:
            return super().fill()
        try:
            count = system_splice()(self.source.fileno(), self._ends[1], SystemPipes.SIZE)
        except BLOCKED:
            count = 0
        except OSError as error:
            if error.errno not in self.UNABLE:
                return self.tunnel.close(self.tunnel.fault_of(self.source, error))
            self._copy()
            return super().fill()
        # splice() stops before urgent data, as if nothing were there, or the end; recv() does not.
        if not count:
            return super().fill()
        self.count += count
        self.keep(range(count))
        self._small = self._small + 1 if count < self.SMALLEST else 0
        self.flush()
        if self._small > self.CALM and not self.load:
            self._copy()

    def flush(self):
        if not isinstance(self.load, range):
            return super().flush()
        self.tunnel.last_active = self.tunnel.loop.now
        try:
            sent = system_splice()(self._ends[0], self.sink.fileno(), len(self.load))
        except BLOCKED:
            sent = 0
        except OSError as error:
            return self.sink_failed(error)
        self.keep(self.load[sent:])
        self.tunnel.watch()

    def sink_failed(self, error):
        self._copy()                    # what is in the system pipe is lost with the sink
        super().sink_failed(error)


class Tunnel(Relay):
    """A relay that joins two sockets.

    near, far    the sockets of client and target, which the tunnel owns from now on
    surplus      bytes that the client has sent already, for the target

    It ends when both directions are done.  If it ends early, by a reset, a time limit or the end of
    its loop, both sides get an RST: an ordinary end would make the data look complete.
    """
    GRACE = 0.5                         # seconds, see `Pipe`

    UNPROBED = 5.0                      # seconds, see probe()

    __slots__ = ('up', 'down', 'sink_failure', 'fault', 'is_probed')

    def __init__(self, client, near, far, surplus=b''):
        self.client, self.due = client, None
        self.up = Pipe(self, near, far, surplus)
        self.down = Pipe(self, far, near)
        self.up.twin, self.down.twin = self.down, self.up
        self.sink_failure = None        # text: why one side takes no more data
        self.fault = None               # the same, if it is an error
        self.is_probed = False

    @property
    def patience(self):
        limit = self.client.idle_timeout
        if self.up.done or self.down.done:
            if self.sink_failure:
                return self.GRACE
            limit = limit or self.up.done and self.client.linger
            if not self.is_probed:
                return min(limit or self.UNPROBED, self.UNPROBED)
        return limit

    def probe(self):
        """Have the system look for dead peers: nothing else would tell of one now.

        Not at once, because most tunnels end soon after one direction has.
        """
        self.is_probed = True
        for sock in (self.up.source, self.down.source):
            with contextlib.suppress(OSError):          # a unix socket has no such options
                for option, value in PROBES:
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def expire(self):
        """Close the tunnel if it is idle, else set the timer for when it may be.

        Reads do not set the timer, which would cost more than to look again when it expires.
        """
        if not self.client:             # closed earlier in this round
            return
        patience, now = self.patience, time.monotonic()
        if patience and self.last_active + patience <= now:
            if not self.sink_failure:
                if (self.up.done or self.down.done) and not self.is_probed:
                    self.probe()
                # The system may still send, of what the tunnel has given it before: a slow receiver
                # may take minutes for what is in its buffers.
                self.last_active = max(self.last_active, now - min(
                    seconds_since_sent(self.up.source), seconds_since_sent(self.down.source)))
            patience = self.patience            # which may be another one now
            if patience and self.last_active + patience <= now:
                return self.close(self.sink_failure or 'idle')
        if patience:
            self.loop.timers.set(self, self.last_active + patience)

    def fault_of(self, sock, error):
        """The outcome, a text, for an error of one of the two sockets."""
        side = 'client' if sock is self.up.source else 'target'
        return f'{side}: {printable_line(reason(error))}'

    @property
    def traffic(self):
        """Bytes from the client, and from the target."""
        return self.up.count, self.down.count

    def start(self, loop, near_events=0):
        """Begin or go on in `loop`, which already watches the client's socket for `near_events`."""
        self.attach(loop)
        loop.held += len(self.up.load) + len(self.down.load)
        for sock in (self.up.source, self.down.source):
            if isinstance(sock, Layer):
                sock.count_in(loop)
        self.up.events = near_events
        self.watch(True)
        if self.up.load:
            self.up.flush()

    def move(self, loop, pipes):
        """Go on in another loop, splicing unless there is a layer; `pipes` is a `SystemPipes`.

        Call this in the thread of the present loop.
        """
        self.detach()
        if not (isinstance(self.up.source, Layer) or isinstance(self.down.source, Layer)):
            self.up, self.down = SplicePipe(self.up, pipes), SplicePipe(self.down, pipes)
            self.up.twin, self.down.twin = self.down, self.up
        self.loop = loop
        loop.items[self] = True         # at once, so that limits on clients always count it
        loop.call(self, self.start, loop)

    def detach(self):
        loop = self.loop
        if self.due:
            loop.timers.set(self, None)
        loop.items.pop(self, None)
        for pipe in (self.up, self.down):
            if pipe.events:
                loop.watch(pipe.source, pipe.events, 0, pipe)
                pipe.events = 0
            if isinstance(pipe.source, Layer):
                pipe.source.count_in(None)
        loop.held -= len(self.up.load) + len(self.down.load)

    def watch(self, is_first=False):
        """Watch both sockets for what the pipes wait for, or end if both pipes are done.

        is_first    the task has watched the client's socket until now
        """
        up, down = self.up, self.down
        if up.done and down.done:
            return self.close(self.fault or 'done')
        for pipe, twin in (up, down), (down, up):
            wanted = ERRORS if pipe.load or pipe.done else READ
            if twin.load or getattr(pipe.source, 'unsent', False):
                wanted = wanted & READ | WRITE          # without ERRORS, which is edge-triggered
            if wanted != pipe.events or is_first:
                self.loop.watch(pipe.source, pipe.events, wanted, pipe)
                pipe.events = wanted

    def close(self, outcome):
        """Close both sockets, with an RST unless the outcome is 'done'.  Further calls do nothing.
        """
        client, self.client = self.client, None
        if not client:
            return
        self.detach()                   # before close(), since the loop needs the descriptors
        # A forwarding HTTP layer has the cause in `failure`, such as a malformed request.
        cause = getattr(self.up.source, 'failure', None) or outcome
        for pipe in (self.up, self.down):
            pipe.done, pipe.load = True, b''
            if outcome == 'done':
                pipe.source.close()
            else:
                abort(pipe.source)
        client.end(cause, self.up.count, self.down.count)


class Reassembly:
    """Joins the fragments of datagrams, one datagram at a time (RFC 1928 section 7)."""
    PATIENCE = 10.0                     # seconds for one datagram; the RFC asks for at least 5
    LARGEST = 65507                     # bytes of payload of one UDP datagram over IPv4

    def __init__(self):
        self.position = 0               # of the last fragment; 0: there are no fragments

    def add(self, datagram, now):
        """Take a `Datagram`; return a complete one, or None if fragments are missing.

        A datagram that is not a fragment is complete.  It drops the fragments that there are, as
        does a fragment out of order or too late.
        """
        position, last = datagram.fragment & 0x7F, datagram.fragment & 0x80
        if position == self.position > 1 and now <= self._end:
            return None                 # a duplicate; at position 1, a new datagram begins
        if position != self.position + 1 or self.position and now > self._end:
            self.position = 0
        if not datagram.fragment:
            return datagram
        if position == 1:
            self._address, self._parts, self._end = datagram.address, [], now + self.PATIENCE
        elif not self.position or datagram.address != self._address:
            self.position = 0
            return None
        self.position = position
        self._parts.append(datagram.payload)
        if sum(map(len, self._parts)) > self.LARGEST:
            self.position = 0
        elif last:
            self.position = 0
            return Datagram(self._address, b''.join(self._parts))
        return None


class Latest(dict):
    """A dictionary of the latest items: at most `limit`, and at most ROOM bytes of headers.

    Headers, as keys, are chosen by clients and may be 262 bytes long each, so their size is limited
    too.  Addresses as keys count as 2 bytes.
    """
    ROOM = 1 << 16

    def __init__(self, limit):
        super().__init__()
        self._limit = limit
        self._size = 0                  # bytes of keys

    def remember(self, key, value):
        """Set `key` to `value` as the latest item, dropping the oldest ones if necessary."""
        if key in self:
            self.forget(key)
        self._size += len(key)
        while len(self) >= self._limit or self and self._size > self.ROOM:
            oldest = next(iter(self))
            self._size -= len(oldest)
            del self[oldest]
        self[key] = value

    def forget(self, key):
        if key in self:
            self._size -= len(key)
            del self[key]

    def clear(self):
        super().clear()
        self._size = 0


class Target:
    """The destination of all datagrams with the same header.

    route    (socket to send from, `Address` of the target)
    way      the `Way` to it
    until    time until which the route needs no review; infinity for an IP address
    found    time when the name was looked up
    spare    `Address` of the other family to try as long as nothing has come back, or None
    """
    __slots__ = ('route', 'way', 'until', 'found', 'spare')

    def __init__(self, route, way, until=float('inf'), found=0.0, spare=None):
        self.route = route
        self.way = way
        self.until = until
        self.found = found
        self.spare = spare


class Routes:
    """The routes of one client's datagrams, in both directions; `relay` is its `UdpRelay`.

    Theory of operation.  The bytes of a header are the key to its `Target`, so a header is
    unpacked, resolved and judged once, not for each datagram.  In the other direction, the address
    of a sender is the key to the header of its answers.

    Payloads wait in a queue, by header, while their name is looked up, or an association at another
    proxy is opened.  A name is looked up again from time to time while it is used.  If it has
    addresses of both families and nothing comes back from the first one, the spare one gets the
    datagrams too, until one of them answers: UDP has no connect that could fail.
    """
    LIMIT = 1024                        # targets, and senders, to remember
    LOOKUPS = 128                       # look-ups at a time; the pool lets a few of them begin
    LONGEST_IDNA = 60                   # characters; encoding a longer name takes too much time
    QUEUE, ROOM = 512, 1 << 18          # datagrams that may wait for look-ups, and their bytes
    PATIENCE = 10.0                     # seconds for one look-up
    RETRY = 5.0                         # seconds before a failed target, or proxy, is tried again
    REFRESH = Resolver.MEMORY + 1       # seconds before a name is looked up again
    TRIAL = 1.0                         # seconds before the spare address is tried, and again

    def __init__(self, relay):
        self.relay = relay
        self.known = Latest(self.LIMIT)         # `Target` by header
        self.headers = Latest(self.LIMIT)       # header by sender, b'' before its first answer
        self._failed = Latest(self.LIMIT)       # time of the next try, by header
        self._on_trial = Latest(self.LIMIT)     # `Target` with a spare, by either address
        self._queues = {}                       # payloads that wait for a look-up, by header
        self._count = self._size = 0            # number of these, and bytes with their headers
        self._waiting = deque()                 # headers of names to look up
        self._under_way = 0                     # number of _find_waiting()s
        self._openings = {}                     # headers that wait for an association, by `Way`
        self._pauses = {}                       # (time of the next try, error before), by `Way`

    def forward(self, header, datagram):
        """Send the payload of `datagram` now, or when its target is resolved."""
        target = self.known.get(header)
        if target:
            self.relay.up.send(target.route, datagram.payload)
            if self.relay.loop.now >= target.until:
                self._refresh(header, target, datagram.payload)
        elif header in self._queues:
            self._queue(header, datagram.payload)
        elif self._failed.get(header, 0) > self.relay.loop.now:
            self.relay.drop('its target has failed recently')
        else:
            self._begin(header, datagram)

    def _begin(self, header, datagram):
        """Find the route for a new header, and send the payload, or queue it meanwhile."""
        client, host = self.relay.client, datagram.address.host
        if len(host) > self.LONGEST_IDNA and not is_plain(host):
            return self.relay.drop('a long name that is not ASCII')
        try:
            address = client.server.permitted(client, datagram.address)
        except ProxyError as error:
            return self.relay.drop(error)
        if ip_bytes(address.host) is not None and not any(
                way.chain for way in client.server.ways(client, address)):
            run(self._find(header, datagram))   # which waits for nothing
        elif self._queue(header, datagram.payload):
            self._look_up(header)

    def _start(self, conversation):
        Errand(self.relay, conversation).start(self.relay.loop)

    def _queue(self, header, payload):
        """Queue a payload for a look-up; whether there is room for it."""
        size = len(header) + len(payload)
        if self._count >= self.QUEUE or self._size + size > self.ROOM:
            return self.relay.drop('too many datagrams wait')
        self._queues.setdefault(header, []).append(payload)
        self._count += 1
        self._size += size
        return True

    def _refresh(self, header, target, payload):
        """Do what `until` of the target asks for: a new look-up, or a try of the spare address."""
        now = self.relay.loop.now
        target.until = target.found + self.REFRESH
        if now >= target.until:
            target.found = now
            target.until = now + self.REFRESH
            self._look_up(header)
        if target.spare:
            target.until = min(target.until, now + self.TRIAL)
            self._try_spare(target, payload)

    def _try_spare(self, target, payload):
        """Send the payload to the spare address."""
        with contextlib.suppress(OSError):      # there may be no route for that family
            route = self.relay.far_socket(target.way, target.spare.host), target.spare
            self._start_trial(route, target)
            self.relay.up.send(route, payload)

    def _start_trial(self, route, target):
        """Have the first answer from the route's address make it the address of the target."""
        _, address = route
        self.headers.remember(address, b'')
        self._on_trial.remember(address, target)

    def _look_up(self, header):
        self._waiting.append(header)
        if self._under_way < self.LOOKUPS:
            self._start(self._find_waiting())

    def _find_waiting(self):
        """Conversation: find the routes of the headers that wait, one after the other."""
        self._under_way += 1
        while self._waiting:
            yield from self._find(self._waiting.popleft())
        self._under_way -= 1

    def _find(self, header, datagram=None):
        """Conversation: find the route of a header, and send the payload of `datagram`, which has
        it, or those in its queue.

        A target that is known already keeps its route if its address is still among the addresses,
        or if the look-up has failed; it loses the route if it is no longer allowed.
        """
        target = failure = None
        try:
            address = datagram.address if datagram else Address.unpack(reader(header[3:])[0])
            target = yield from self._target(header, address)
            if not target:
                return
        except OSError as error:
            failure = error
        payloads = [datagram.payload] if datagram else self._queues.pop(header, ())
        if not datagram:
            self._count -= len(payloads)
            self._size -= sum(len(header) + len(payload) for payload in payloads)
        if failure:
            if isinstance(failure, Refused) or header not in self.known:
                self._fail(header, failure, payloads)
            return
        for payload in payloads:
            if not self.relay.up.send(target.route, payload) and target.spare:
                self._try_spare(target, payload)
        # A client that sends once and waits, as for DNS, would never get to a review.
        if target.spare and payloads and len(self.relay.errands) < 2 * self.LOOKUPS:
            self._start(self._retry_spare(target, payloads[-1]))

    def _retry_spare(self, target, payload):
        """Conversation: send the payload to the spare address if nothing comes back in TRIAL."""
        yield Wait((), (), deadline(self.TRIAL))
        if target.spare:
            self._try_spare(target, payload)

    def _fail(self, header, error, payloads):
        """Remember that a target has failed, and drop its payloads."""
        self.known.forget(header)
        if error.errno in NO_ROOM:      # which says nothing about the target
            self.relay.client.server.starve(error)
        else:
            self._failed.remember(header, self.relay.loop.now + self.RETRY)
        for _ in payloads:
            self.relay.drop(reason(error))

    def _target(self, header, address):
        """Conversation: the `Target` for a header with this `Address`; None if it waits for an
        association that another conversation opens, which then sees to the header.

        Raises OSError if no address is allowed or has a route.  A target that is known already
        keeps its address if that is among those found.
        """
        client, server = self.relay.client, self.relay.client.server
        until, known = deadline(self.PATIENCE), self.known.get(header)
        ways, found = yield from server.find_ways(client, address, until)
        for way in ways:
            try:
                if way.passes_names and not found:      # what it may be asked for, as for CONNECT
                    addresses = [server.unresolved(client, address)]
                else:
                    addresses = self._candidates(known, found or (
                        yield from server.destinations(client, address, until)))
                if known and known.route[1] == addresses[0]:
                    return known
                if way.chain and way not in self.relay.far and not (
                        yield from self._open(way, header)):
                    return None
                return self._learn(header, way, address, addresses)
            except OSError as error:
                if way is ways[-1] or not server.is_unreached(error, way):
                    raise

    @staticmethod
    def _candidates(known, addresses):
        """The first address of each family; that of the `Target` so far, if there is one, comes
        first, because name servers vary the order."""
        firsts = {}
        if known and known.route[1] in addresses:
            addresses = [known.route[1], *addresses]
        for address in addresses:
            firsts.setdefault(family_of(address.host), address)
        return list(firsts.values())

    def _open(self, way, header):
        """Conversation: open the association for a `Way`.  The result is False if another
        conversation does that, and then looks up the header.

        Raises OSError, at once for some time after a failure.
        """
        if way in self._openings:
            self._openings[way].append(header)
            return False
        relay = self.relay
        pause_end, error = self._pauses.get(way, (0, None))
        if relay.loop.now < pause_end:
            raise error.with_traceback(None)    # else it grows each time
        pause_end, self._openings[way] = relay.loop.now + self.RETRY, []
        error = OSError(errno.ECONNRESET, 'the association at the next proxy has ended')
        try:
            relay.use(way, (yield from relay.client.server.associate(
                way, deadline(self.PATIENCE))))
        except OSError as caught:
            error = caught
        self._pauses[way] = pause_end, error
        for header in self._openings.pop(way):
            self._look_up(header)
        if way not in relay.far:
            raise error
        return True

    def _learn(self, header, way, wanted, addresses):
        """Remember a new `Target` for a header: at the first of one or two addresses that has a
        route, with the other one as a spare.  Raises OSError if none has."""
        relay = self.relay
        while True:
            address, *addresses = addresses
            try:
                route = relay.far_socket(way, address.host), address
                break
            except OSError:
                if not addresses:
                    raise
        name, is_name = canonical(wanted).host, ip_bytes(address.host) is None
        was_found = not is_name and name != address.host        # by a look-up
        relay.targets += header not in self.known
        relay.client.target = counted(relay.targets, 'target')
        log.debug('%s: datagrams to %s%s', relay.client.address,
                  f'{name}, ' if was_found else '', address)
        target = Target(route, way)
        self.known.remember(header, target)
        if is_name:
            route[0].has_names = True
        if was_found:
            target.found = relay.loop.now
            target.until = target.found + (self.TRIAL if addresses else self.REFRESH)
        if addresses:
            target.spare, = addresses
            self._start_trial(route, target)
        else:
            answers = udp_header(address)
            # Equal bytes are kept once; most targets are IP addresses.
            self.headers.remember(address, header if header == answers else answers)
        return target

    def forget_far(self, sock):
        """Forget the routes by a socket that is closed; they are found again when they are used."""
        for header, target in list(self.known.items()):
            if target.route[0] is sock:
                target.spare = None
                self.known.forget(header)

    def drop_queues(self):
        """Drop the payloads that wait for look-ups."""
        self._queues.clear()
        self._waiting.clear()
        self._count = self._size = 0

    def forget(self):
        """Forget all targets, so that they are judged again."""
        for target in (*self.known.values(), *self._on_trial.values()):
            target.spare = None         # _retry_spare() would not judge it
        for known in (self.known, self.headers, self._failed, self._on_trial, self._pauses):
            known.clear()

    def header_for(self, source, sock):
        """The header for answers from the address `source`, whose first one has come to `sock`.

        None if they cannot be passed on yet, or must not be (Settings.udp_strict).
        """
        if not self.relay.reply_to:     # the client has sent nothing at all
            return None
        if source not in self.headers and self.relay.client.server.settings.udp_strict:
            # Where another proxy looks names up, the addresses of targets are not known.
            if not getattr(sock, 'has_names', False):
                return None
        target = self._on_trial.get(source)
        if target:
            self._on_trial.forget(source)
            target.route = sock, Address(*source)
            target.spare, target.until = None, target.found + self.REFRESH
        header = udp_header(Address.of(source))
        self.headers.remember(source, header)
        return header


@functools.lru_cache()
def can_segment():
    """Whether the system can split what sendmsg() takes into datagrams (UDP_SEGMENT, Linux 4.18).

    Raises OSError if no descriptor is left.
    """
    if sys.platform != 'linux':
        return False
    with _orig_socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.getsockopt(socket.SOL_UDP, UDP_SEGMENT)
        except OSError:
            return False
    return True


class Burst:
    """Sends the datagrams of one direction of a `UdpRelay`, and counts them.

    drop      function(reason), called for each datagram that the system has not taken
    count     the datagrams that the system has taken
    bytes     bytes of payload in these

    Datagrams of one size that follow each other to one destination go out by one system call, where
    the system can do that; the last one may be smaller.  The system handles them as one for most of
    the way: with 8 at a time, Linux takes 1.0 instead of 3.7 microseconds for each.

    add() may keep datagrams for the next ones, so flush() is called at the end of each turn of a
    socket.  If the system refuses datagrams together, each is sent by itself.  If that works after
    an error of UNFIT, their size is the cause, such as one beyond the MTU of the route, and those
    of that size or more are sent one by one from then on.
    """
    MOST = 8                            # datagrams; more save little, and delay the first of them
    LARGEST = 65507                     # bytes in all, as in one datagram over IPv4
    UNFIT = {errno.EINVAL, errno.EIO, errno.EMSGSIZE}   # how Linux refuses only what is joined

    __slots__ = ('count', 'bytes', '_drop', '_largest', '_waiting', '_route', '_size', '_header',
                 '_room')

    def __init__(self, drop):
        self.count = self.bytes = 0
        self._drop = drop
        self._largest = 0               # bytes of one that can be joined to others
        with contextlib.suppress(OSError):
            self._largest = self.LARGEST if can_segment() else 0
        self._waiting = []              # datagrams
        self._route = None              # (socket, address) of these, see send()
        self._size = 0                  # bytes of each
        self._header = 0                # bytes in each that are not payload
        self._room = 0                  # number of datagrams that may join them

    def add(self, route, datagram, header=0):
        """Send a datagram, now or at the next flush(); see send() for the arguments."""
        size = len(datagram)
        # Answers by way of another proxy have various headers: of both families, with names.
        if route is not self._route or not 0 < size <= self._size or header != self._header:
            if self._waiting:
                self.flush()
            if not 0 < size <= self._largest or not isinstance(route[0], _orig_socket):
                self.send(route, datagram, header)
                return
            self._route, self._size, self._header = route, size, header
            self._room = min(self.MOST, self.LARGEST // size)
        self._waiting.append(datagram)
        self._room -= 1
        if not self._room or size < self._size:
            self.flush()

    def flush(self):
        """Send what waits."""
        waiting, self._waiting = self._waiting, []
        route, self._route, is_unfit = self._route, None, False
        if len(waiting) > 1:
            sock, address = route
            segments = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack('=H', self._size))]
            try:
                total = sock.sendmsg(waiting, segments, 0, address)
                self.count += len(waiting)
                self.bytes += total - len(waiting) * self._header
                return
            except OSError as error:
                is_unfit = error.errno in self.UNFIT
        for datagram in waiting:
            if self.send(route, datagram, self._header) and is_unfit:
                self._largest = self._size - 1

    def send(self, route, datagram, header=0):
        """Send a datagram at once; whether the system has taken it.

        route     (socket, address); the address is None if the socket is connected
        header    number of bytes in the datagram that are not payload
        """
        sock, address = route
        try:
            if address:
                sock.sendto(datagram, address)
            else:
                sock.send(datagram)
        except OSError as error:        # too large with its header, or the client's port is closed
            self._drop(reason(error))
            return False
        self.count += 1
        self.bytes += len(datagram) - header
        return True


class UdpRelay(Relay):
    """Relays the datagrams of one client to any targets, and back (RFC 1928 section 7).

    control    the client's TCP connection; the relay ends with it
    near       the UDP socket for the client
    hint       `Address` that the client has announced to send from; port 0 if it does not know
    is_here    whether the client is on this host
    release    function to call at the end, when `near` is closed, or None
    up, down   the `Burst`s to targets, and to the client

    Datagrams are accepted only from the IP address of the control connection.  The port from which
    the first one comes is the client's, the `owner`.  If the client has announced another port, the
    first datagram from there makes that one the owner, for good.

    Unless the announced port may still take over, `near` is connected to the owner, so that the
    system itself drops the datagrams of strangers.  A port that was not announced may be changed by
    a NAT on the way: after SILENCE without datagrams, the next port becomes the owner.  This is not
    so for a client on this host, where another port is another program.

    Datagrams that cannot be relayed are dropped and counted, never answered.

    Datagrams from targets do not show that the client is still there.  If nothing else comes, they
    keep the relay alive for ONE_WAY times the idle time only (compare RFC 4787 section 4.3).
    """
    SILENCE = 20.0                      # seconds
    ONE_WAY = 4

    def __init__(self, client, control, near, hint=UNSPECIFIED, is_here=True, release=None):
        self.client, self.due = client, None
        self.host = client.address.host
        self.control = control
        self.near = protected(near, control)
        self.shared_port = near if isinstance(near, SharedPort) else None
        self.hint = hint
        self.is_here = is_here
        self.release = release
        self.receivers = {}             # functions to call when a socket is ready, by descriptor
        self.owner = None               # the client's UDP address, as recvfrom() returns it
        self.reply_to = None            # the owner, or the last one while there is none
        self.connected = False          # `near` is connected to the owner
        self.is_filtered = False        # all datagrams that can be read from it are the owner's
        self.is_settled = False         # the owner stays when it is silent
        self.far = {}                   # sockets for targets, see far_socket() and use()
        self.inbound = ()               # local addresses that the client has connected to
        self.routes = Routes(self)
        self.errands = set()            # `Errand`s that have not ended
        self.reassembly = Reassembly()
        self.targets = 0                # how many have been used
        self.up, self.down = Burst(self.drop), Burst(self.drop)
        self.dropped = 0                # datagrams
        if near is control:             # no one else can send there: the client is the owner
            self.owner = self.reply_to = near.source
            self.connected = self.is_settled = True

    @property
    def patience(self):
        return self.client.server.settings.udp_timeout

    @property
    def traffic(self):
        """Bytes of payload from the client, and from targets."""
        return self.up.bytes, self.down.bytes

    def start(self, loop, control_events=0):
        """Begin in `loop`, which already watches the control connection for `control_events`."""
        self.last_heard = loop.now      # time of the client's last datagram
        self.attach(loop)
        self.client.server.sessions.associations += 1
        self.watch_association(self.near, self.control, self.from_client, self.client_ended,
                               control_events)
        if self.shared_port:
            self.shared_port.join(self)
        for way, association in self.far.items():
            self.use(way, association)

    def watch_association(self, datagrams, control, receive, ended, control_events=0):
        """Have receive() called for datagrams, and ended(why) when their TCP connection has ended,
        regularly if `why` is ''."""
        if datagrams is control:
            datagrams.start(self, receive, ended, control_events)
        else:
            self.watch(control, functools.partial(self.read_control, control, ended),
                       control_events)
            if datagrams.fileno() >= 0:         # a SharedPort receives by itself
                self.watch(datagrams, receive)

    def watch(self, sock, receive, before=0, wanted=READ):
        """Have receive() called when `sock` is ready, as Loop.watch()."""
        self.receivers[sock.fileno()] = receive
        self.loop.watch(sock, before, wanted, self)

    def ready(self, fd, _):
        self.receivers[fd]()

    def read_control(self, control, ended):
        """Ignore data on the TCP connection of an association (RFC 1928 section 6)."""
        try:
            if control.recv(4096):
                return
            why = ''
        except BLOCKED:
            return
        except OSError as error:
            why = printable_line(reason(error))
        ended(why)

    def client_ended(self, why):
        self.close(f'client: {why}' if why else 'done')

    def close_socket(self, sock):
        """Close a socket, which the loop watches or not."""
        if self.receivers.pop(sock.fileno(), None):
            self.loop.watch(sock, READ, 0, self)
        sock.close()

    def expire(self):
        """Close the relay if it is idle; forget an owner that is silent; else set the timer."""
        if not self.client:             # closed earlier in this round
            return
        now, times = self.loop.now, []
        if self.owner and not self.is_settled:
            if now >= self.last_heard + self.SILENCE:
                return self.forget_owner()
            times.append(self.last_heard + self.SILENCE)
        if self.patience:
            times.append(min(max(self.last_heard, self.last_active) + self.patience,
                             self.last_heard + self.ONE_WAY * self.patience))
            if now >= times[-1]:
                return self.close('idle')
        self.loop.timers.set(self, min(times, default=None))

    # From the client

    def from_client(self):
        """Relay the client's datagrams, for the time slice of this socket.

        This is the busiest code: known headers are not unpacked, and names used in the loop are
        local.
        """
        loop, known, reassembly = self.loop, self.routes.known, self.reassembly
        near, is_filtered, source = self.near, self.is_filtered, self.owner
        receive = near.recv_into if is_filtered else near.recvfrom_into
        buffer, now = loop.buffer, loop.now
        add, monotonic = self.up.add, time.monotonic
        end_of_turn = monotonic() + loop.time_slice
        try:
            while monotonic() < end_of_turn:
                try:
                    received = receive(buffer)
                except BLOCKED:
                    # What came before connect() has been read: the rest is from the owner.
                    self.is_filtered = self.connected and isinstance(near, _orig_socket)
                    return
                except OSError:         # an ICMP error for an earlier send
                    continue
                if is_filtered:         # saves the making of the address
                    count = received
                else:
                    count, source = received
                # The common case, IPv4, without a call.
                end = 10 if count >= 10 and buffer[3] == 1 else header_end(buffer, count)
                if end > count or source != self.owner and not self.admit(source):
                    self.drop('malformed, or not from the client:', source)
                    continue
                self.last_heard = now
                header, payload = bytes(buffer[:end]), bytes(buffer[end:count])
                target = known.get(header)
                if target and now < target.until and not reassembly.position:
                    add(target.route, payload)
                else:
                    self.slow_path(header, payload)
        finally:
            self.up.flush()

    def admit(self, source):
        """Whether a valid datagram from another address than the owner's makes it the owner."""
        if Address.of(source).host != self.host or not source[1]:
            return False                # nothing can be sent to port 0, which stands for no hint
        announced = source[1] == self.hint.port
        if self.owner:
            if not announced:
                return False
            self.close_far()            # the former owner may be another program: not its answers
        self.owner = self.reply_to = source
        self.is_settled = announced or self.is_here
        if announced or not self.hint.port:
            with contextlib.suppress(OSError):
                self.near.connect(source)
                self.connected = True
        self.last_heard = self.loop.now
        self.expire()                   # sets the timer for the owner's silence
        return True

    def close_far(self):
        """Close the sockets for targets, and forget the routes that use them, and what waits."""
        self.up.flush()                 # what came before
        self.routes.forget()
        self.routes.drop_queues()
        while self.far:
            self.close_one(next(iter(self.far)))

    def close_one(self, key):
        """Close the socket for targets, or the `FarAssociation`, that is `far[key]`."""
        far = self.far.pop(key)
        for sock in getattr(far, 'sockets', [far]):
            self.close_socket(sock)
        return far

    def forget_owner(self):
        """Let the client's next port be the owner; answers go to the last one until then."""
        if self.connected:              # not every system can undo that, so take a new socket
            address = local_address(self.near)
            self.close_socket(self.near)
            try:
                self.near = protected(bound_udp(address), self.control)
            except OSError as error:
                return self.close(reason(error))
            self.watch(self.near, self.from_client)
            self.connected = self.is_filtered = False
        self.owner = None
        self.expire()

    def slow_path(self, header, payload):
        """Handle a datagram that is a fragment, or whose target is unknown or due for review."""
        self.up.flush()                 # what came before it
        datagram = self.reassembly.add(
            Datagram(Address.unpack(reader(header[3:])[0]), payload, header[2]), self.loop.now)
        if datagram:
            self.routes.forward(b'\0\0\0' + header[3:], datagram)       # without FRAG

    def far_socket(self, way, host):
        """The socket for targets that are reached by a `Way`, of the family of the IP address
        `host`; the `FarAssociation` if the way has proxies.  OSError if there is none."""
        source = self.inbound if way.is_inbound else way.source
        key = way if way.chain else (source, family_of(host))
        if key not in self.far:
            if way.chain:
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
            sock = self.far[key] = bound_udp(
                source_of(key[1], source or self.client.server.settings.source))
            self.watch(sock, functools.partial(self.from_target, sock))
        return self.far[key]

    def use(self, way, association):
        """Reach the targets of a `Way` by a `FarAssociation`."""
        log.debug('%s: datagrams through %s', self.client.address,
                  ', then '.join(map(str, way.chain)))
        self.far[way] = association
        self.watch_association(association.datagrams, association.control,
                               functools.partial(self.from_target, association),
                               functools.partial(self.far_ended, way))

    def far_ended(self, way, why):
        """The association at another proxy has ended; it is opened again for a later datagram."""
        log.debug('%s: the association at %s has ended: %s', self.client.address, way.chain[-1],
                  why or 'closed')
        self.routes.forget_far(self.close_one(way))

    # To the client

    def from_target(self, sock):
        """Relay the datagrams of targets to the client, for the time slice of `sock`."""
        loop, headers = self.loop, self.routes.headers
        buffer, now = loop.buffer, loop.now
        route = self.near, None if self.connected else self.reply_to
        add, monotonic = self.down.add, time.monotonic
        end_of_turn = monotonic() + loop.time_slice
        try:
            while monotonic() < end_of_turn:
                try:
                    count, source = sock.recvfrom_into(buffer)
                except BLOCKED:
                    return
                except OSError:         # an ICMP error for an earlier send
                    continue
                header = headers.get(source[:2]) or self.routes.header_for(source[:2], sock)
                if not header:
                    self.drop('the client has sent nothing to', source)
                    continue
                self.last_active = now
                add(route, header + buffer[:count], len(header))
        finally:
            self.down.flush()

    def close_near(self):
        """Close the sockets for the client."""
        if self.shared_port:
            self.shared_port.leave(self)
        for sock in self.control, self.near:
            self.close_socket(sock)
        if self.release:
            self.release()

    def drop(self, *why):
        """Count a datagram as dropped, and log the reason."""
        self.dropped += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug('%s: datagram dropped: %s', self.client.address, ' '.join(map(str, why)))

    def close(self, outcome):
        """Close all sockets and log the client's line.  Further calls do nothing."""
        client, self.client = self.client, None
        if client:
            self.detach()
            for errand in list(self.errands):
                errand.cancel()
            self.close_far()
            self.close_near()
            client.server.sessions.associations -= 1
            client.target = (f'{counted(self.targets, "target")}, '
                             f'{counted(self.up.count, "datagram")} up, {self.down.count} down')
            if self.dropped:
                outcome = f'{outcome}, {counted(self.dropped, "datagram")} dropped'
            client.end(outcome, *self.traffic)


class StreamDatagrams:
    """A connection with datagrams in it, with as much of a UDP socket's interface as a relay needs.

    Each message in the connection is one datagram, which send() takes and recvfrom_into() returns
    with the header that it has over UDP (RFC 1928 section 7).

    sock       non-blocking socket or `Layer`, which it owns
    source     what recvfrom_into() returns as the sender
    surplus    bytes that were read already
    form       the form of messages: `StreamedDatagram`, or a `Form6`

    Theory of operation.  The messages of several send() go out together, at the end of a round of
    the loop.  A message is never split by a lack of room: send() raises an error for one that would
    make more than `_room` bytes wait, so that a peer that does not read cannot fill the memory.
    These bytes count in the loop like what pipes hold, and are as few as there if that is much.
    After an error of the socket all that waits is dropped; recvfrom_into() tells of the error.
    """
    SIZE = 1 << 16                      # bytes to read at a time
    ROOM = 1 << 17                      # bytes: `_room`, unless memory is short

    def __init__(self, sock, source, surplus=b'', form=StreamedDatagram):
        self._sock = sock
        self.source = source
        self.form = form
        self._relay = None
        self._events = 0                # that the socket is watched for
        self._data = surplus            # bytes read
        self._start = 0                 # where the next message begins in them
        self._has_more = bool(surplus)  # there may be a whole message in them
        self._is_due = False            # _receive_rest() is in the loop's inbox
        self._messages = []             # what waits for the socket: messages,
        self._sending = b''             # and, before them, bytes of which the socket took a part
        self._size = 0                  # bytes of both
        self._room = self.ROOM          # bytes that may wait; a single message may have more
        self._held = 0                  # bytes that count in the loop
        self._is_full = False           # the socket did not take all of the last flush()
        self.fileno, self.getsockname = sock.fileno, sock.getsockname

    def start(self, relay, receive, ended, events):
        """Begin to receive and to send, in the loop of a `UdpRelay`.

        receive    function that receives datagrams for a time slice
        ended      function of a text, called when no more will come: why, or '' for a regular end
        events     those that the loop watches the socket for already
        """
        self._relay, self._receive, self._ended = relay, receive, ended
        self._watch(events, READ)
        self._receive_later()

    def _watch(self, before, wanted):
        self._relay.watch(self, self._ready, before, wanted)
        self._events = wanted

    def _ready(self):
        if self._events & WRITE:
            self.flush()
        self._receive_rest()

    def _receive_rest(self):
        self._is_due = False
        if self._relay:                 # else it was closed meanwhile
            try:
                self._receive()
                self._receive_later()
            except EOFError as end:
                self._ended(str(end))

    def _receive_later(self):
        """Receive in the next round, if there may be more even if the socket is not readable."""
        if self._has_more and self._relay and not self._is_due:
            self._is_due = True
            self._relay.loop.call(self._relay, self._receive_rest)

    def _count(self, held):
        self._relay.loop.held += held - self._held
        self._held = held

    def close(self):
        if self._relay:
            self._count(0)
        self._relay = None
        self._sock.close()

    def recvfrom_into(self, buffer):
        """As of a socket; `buffer` has room for SIZE bytes and two RECORDs of a layer.

        Raises EOFError when no more messages will come: the text says why, or it is empty after a
        regular end.
        """
        while True:
            start = self._start
            try:
                datagram = self.form.unpack(self._read).datagram
            except EOFError:
                self._data, self._start = self._data[start:], 0
                self._read_more(buffer)
            except ProtocolError as error:
                raise EOFError(f'malformed message: {error}') from None
            else:
                buffer[:len(datagram)] = datagram
                self._has_more = self._start < len(self._data)
                return len(datagram), self.source

    def _read(self, n):
        start, self._start = self._start, self._start + n
        if self._start > len(self._data):
            raise EOFError
        return self._data[start:self._start]

    def _read_more(self, buffer):
        self._has_more = False
        try:
            count = self._sock.recv_into(buffer, self.SIZE)
        except BLOCKED:
            raise
        except OSError as error:
            raise EOFError(printable_line(reason(error))) from None
        if not count:
            raise EOFError('the end of a message is missing' if self._data else '')
        self._data += bytes(buffer[:count])

    def send(self, datagram):
        """Send a datagram at the next flush(), or raise OSError if there is no room for it."""
        message = message_of(self.form, datagram)
        if self._size + len(message) > self._room and not self._is_full:
            self.flush()
        if self._size and self._size + len(message) > self._room:
            raise OSError(errno.ENOBUFS, 'the connection does not take more')
        self._messages.append(message)
        self._size += len(message)
        if self._size == len(message):
            self._relay.loop.call(self._relay, self.flush)

    def flush(self):
        """Send what waits."""
        if not self._relay:             # closed meanwhile
            return
        try:
            while self._size:
                if not self._sending:   # a layer must get the same bytes again if it is full
                    self._sending = memoryview(b''.join(self._messages))
                    self._messages.clear()
                sent = self._sock.send(self._sending)
                self._sending = self._sending[sent:] or b''     # an empty view keeps its memory
                self._size -= sent
        except BLOCKED:
            pass
        except OSError:
            self._messages.clear()
            self._sending, self._size = b'', 0
        self._is_full = bool(self._size)
        if not (self._is_full and self._held):
            is_short = self._relay.loop.held >= Pipe.HELD
            self._room = Pipe.SMALLEST if is_short else self.ROOM
        self._count(self._room if self._is_full else 0)
        self._watch(self._events, READ | WRITE if self._is_full else READ)


class FarAssociation:
    """An association at another proxy, with as much of the interface of a UDP socket for targets as
    a relay needs.

    datagrams    UDP socket that is connected to the proxy's, or the like of it
    control      TCP connection of the association; by default the datagrams are in it, in a
                 `StreamDatagrams`
    """

    def __init__(self, datagrams, control=None):
        self.datagrams = datagrams
        self.control = control or datagrams
        self.sockets = {self.datagrams, self.control}
        self.has_names = False          # the proxy has been asked for targets by name

    def sendto(self, payload, address):
        """As of a socket; `address` may have a name."""
        datagram = b''.join((udp_header(address), payload))
        try:
            self.datagrams.send(datagram)
        except ConnectionRefusedError:  # an ICMP error for an earlier one
            self.datagrams.send(datagram)

    def recvfrom_into(self, buffer):
        """As of a socket; the sender is an `Address`, which may have a name."""
        count, _ = self.datagrams.recvfrom_into(buffer)
        end = header_end(buffer, count)
        if end > count or buffer[2]:
            raise OSError(errno.EBADMSG, 'malformed, or a fragment')
        source = self.sender(bytes(buffer[3:end]))
        buffer[:count - end] = buffer[end:count]
        return count - end, source

    @staticmethod
    @functools.lru_cache(1024)
    def sender(header):
        """The canonical `Address` in a header, without its first three bytes."""
        return canonical(Address.unpack(reader(header)[0]))

    def close(self):
        for sock in self.sockets:
            sock.close()


class Relay6(UdpRelay):
    """A relay for a SOCKS6 association: its datagrams come in the client's connection, `stream`, or
    to the UDP socket `port`, which may be None.

    The first one decides, and is confirmed in the connection; those that come the other way, or
    from another UDP address, are dropped.
    """

    def __init__(self, client, stream, port=None, release=None):
        super().__init__(client, stream, stream, release=release)
        self.owner = self.reply_to = None
        self.connected = False
        self.stream = stream
        self.port = port and WrappedDatagrams(
            port, functools.partial(message_of, stream.form), stream.form.datagram_in)

    def start(self, loop, control_events=0):
        super().start(loop, control_events)
        if self.port:
            self.watch(self.port, functools.partial(self.from_client, self.port))

    def from_client(self, near=None):
        """Relay the datagrams that come to the UDP socket `near`, or by default in the stream."""
        near = near or self.stream
        if not self.owner:
            self.near = near
        if self.near is near:
            return super().from_client()
        with contextlib.suppress(*BLOCKED):
            near.recvfrom_into(self.loop.buffer)
            self.drop('not by the way of the first one')

    def admit(self, source):
        """Have the first datagram decide."""
        if self.owner or self.near is self.port and not super().admit(source):
            return False
        if self.near is self.stream:
            self.owner = self.reply_to = source
            self.connected = True
            self._close_port()
        self.stream.send(b'')           # the confirmation
        return True

    def slow_path(self, header, payload):
        """As for SOCKS5; but without payload, zeros stand for no target: the datagram decides only.
        """
        if payload or header[3:] not in (UNSPECIFIED.pack(), Address('::', 0).pack()):
            super().slow_path(header, payload)

    def _close_port(self):
        port, self.port = self.port, None
        if port:
            self.close_socket(port)
            self.release()

    def close_near(self):
        self._close_port()
        self.close_socket(self.stream)


class SharedPort:
    """A UDP port for the associations of any number of clients; an item of the server's loop.

    sock    the UDP socket
    uses    number of associations

    It is `near` of `UdpRelay`s: it receives datagrams, and has the right relay read each one.
    From an address that a client has sent from before, a datagram is for that client's relay.  From
    a new address, it is for one of the relays of clients with that IP address:

    1. the one whose client has announced the port
    2. else one that has not had any yet: the oldest, but last those with an announced port
    3. else the only one, if its client has been silent for `UdpRelay.SILENCE`

    If 1 or 2 leaves relays of different users, the datagram is dropped, like one that is for none.
    After 3, answers to what was sent before are dropped: the client may be another program.  2 and
    3 do not apply to late datagrams of an association that has just ended.

    A connected socket for each client would need no dispatcher, but it costs a descriptor, and
    Linux before 6.13 looks through all sockets of a port for each datagram.
    """
    LATE = 2.0                          # seconds
    client = due = None

    def __init__(self, sock, loop):
        self.sock = sock
        self.loop = loop
        self.uses = 0
        self.sendto, self.getsockname = sock.sendto, sock.getsockname
        self._events = 0                # that the socket is watched for
        self._relays = {}               # lists of relays by the IP address of the client
        self._owners = {}               # relay by the address that its client sends from
        self._late = Latest(1024)       # time until which datagrams are late, by that address
        # The rest is of use during ready() only.
        self._found = None              # (length, source) of a datagram in the loop's buffer
        self._source = None             # that of the last one that a relay has read
        self._may_read = False          # the socket may have more, and there is time

    def start(self):
        """Begin to receive, unless the port was closed before."""
        if self.sock.fileno() >= 0:
            self.loop.watch(self.sock, 0, READ, self)
            self._events = READ

    def stop(self):
        """Close the socket."""
        self.loop.watch(self.sock, self._events, 0, self)
        self.sock.close()

    def join(self, relay):
        """Receive for a `UdpRelay`, until leave()."""
        self._relays.setdefault(relay.host, []).append(relay)

    def leave(self, relay):
        if self._owners.pop(relay.reply_to, None):
            self._late.remember(relay.reply_to, self.loop.now + self.LATE)
        self._relays[relay.host].remove(relay)
        if not self._relays[relay.host]:
            del self._relays[relay.host]

    def ready(self, *_):
        """Have relays read the datagrams, for as long as if each had a socket of its own."""
        owners, receive, monotonic = self._owners, self.sock.recvfrom_into, time.monotonic
        loop, buffer = self.loop, self.loop.buffer
        end_of_turn = monotonic() + min(loop.ROUND_TIME, loop.time_slice * (1 + len(owners)))
        self._found, self._may_read = None, True
        while True:
            self._may_read = self._may_read and monotonic() < end_of_turn
            if not self._found:
                if not self._may_read:
                    return
                try:
                    self._found = receive(buffer)
                except BLOCKED:
                    return
                except OSError:         # an ICMP error for an earlier send
                    continue
            relay = owners.get(self._found[1])
            if relay:
                relay.from_client()
            else:
                self._admit(self._found[1])

    def _admit(self, source):
        """Have the relay read a datagram that is from a new address, if there is one for it."""
        relay = self._choose(source, *Address.of(source))
        if relay:
            former = relay.reply_to
            relay.from_client()
            if relay.owner == source:   # the datagram was valid
                self._owners.pop(former, None)
                self._owners[source] = relay
            return
        self._found = None
        if log.isEnabledFor(logging.DEBUG):
            log.debug('%s: datagram dropped: for no association, or for several',
                      Address.of(source))

    def _choose(self, source, host, port):
        """The relay for a datagram from a new address, or None."""
        relays = self._relays.get(host, ())
        possible = [relay for relay in relays if relay.hint.port == port]
        if not possible:
            if self._late.get(source, 0) > self.loop.now:
                return None
            possible = [relay for relay in relays if not relay.reply_to]
        if len({relay.client.user for relay in possible}) > 1:
            return None
        if possible:
            return min(possible, key=lambda relay: (bool(relay.reply_to), relay.hint.port))
        if len(relays) == 1 and not relays[0].owner:
            relays[0].close_far()
            return relays[0]
        return None

    # As `near` of a relay

    def fileno(self):
        """-1: the relay does not watch the socket."""
        return -1

    def recvfrom_into(self, buffer):
        """As of a socket, but as if only datagrams of one source had come: a run of those is read
        at once, then the first of another source waits for ready()."""
        found, self._found = self._found, None
        if found:
            self._source = found[1]
        elif self._may_read:
            try:
                found = self.sock.recvfrom_into(buffer)
            except BLOCKED:
                self._may_read = False
                raise
            if found[1] != self._source:
                self._found, found = found, None
        if not found:
            raise BlockingIOError
        return found

    def connect(self, _):
        """Raises OSError: the socket is not for one client only."""
        raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))

    def close(self, *_):
        """Nothing to do: other relays use the socket, too."""


class SharedPorts:
    """The `SharedPort`s of a server, by the address that each is bound to; `loop` is the server's.
    """
    client = None                       # it is an item of the loop, for _tidy()

    def __init__(self, loop):
        self._loop = loop
        self._ports = {}                # `SharedPort` by `Address`
        self._held = set()              # see hold()
        self._lock = threading.Lock()   # reconfigure() may run in another thread than the loop

    def bind(self, address):
        """Return the `SharedPort` at an `Address`, and a function to call at the end of its use, in
        the thread of the loop.  Raises OSError."""
        with self._lock:
            port = self._ports.get(address) or self._open(address)
            port.uses += 1
        return port, functools.partial(self._tidy, port)

    def _open(self, address):
        others = [port.sock for port in self._ports.values()]
        let_overlap(others, True)
        try:
            sock = bound_udp(address, True)
        finally:
            let_overlap(others, False)
        let_overlap([sock], False)
        self._ports[address] = port = SharedPort(sock, self._loop)
        self._loop.call(port, port.start)
        return port

    def _tidy(self, left=None):
        """End a use of the port `left`, if given; close the ports that are neither used nor held.
        """
        with self._lock:
            if left:
                left.uses -= 1
            for address, port in list(self._ports.items()):
                if not (port.uses or address in self._held):
                    self._ports.pop(address).stop()

    def hold(self, addresses):
        """Keep the ports at a set of `Address`es open, with or without associations, and no others
        without.

        Raises OSError if one of them is in use; nothing changes then.
        """
        with self._lock:
            before, self._held = self._held, addresses
            try:
                for address in addresses - self._ports.keys():
                    self._open(address)
            except OSError as error:
                self._held = before
                raise OSError(error.errno, f'--udp-port: {error.strerror}') from None
            finally:
                self._loop.call(self, self._tidy)

    def close(self, _=None):
        """Close all ports; the loop is closed."""
        for port in self._ports.values():
            port.sock.close()


# ----------------------------------------------------------------------------------------- client

SOCKS4, SOCKS5, HTTP = 1, 2, 3          # PySocks' numbers
SOCKS6 = 4
# Flags that may be added: the layer that SOCKS is inside, and how to speak, see `Flight`.
TLS, GSSAPI, OPTIMISTIC, UDP_IN_TCP = 0x10, 0x20, 0x40, 0x80
FLAGS = TLS | GSSAPI | OPTIMISTIC | UDP_IN_TCP
SCHEMES = {                             # of proxy URLs: type, whether the proxy resolves names
    'socks4': (SOCKS4, False), 'socks4a': (SOCKS4, True), 'socks5': (SOCKS5, False),
    'socks5h': (SOCKS5, True), 'socks': (SOCKS5, True), 'socks6': (SOCKS6, False),
    'socks6h': (SOCKS6, True), 'http': (HTTP, True),
    'https': (HTTP | TLS, True)}
URL_PARAMETERS = {'optimistic=0': 0, 'optimistic=1': OPTIMISTIC, 'udp=tcp': UDP_IN_TCP}
TYPE_NAMES = {SOCKS4: 'SOCKS4', SOCKS5: 'SOCKS5', HTTP: 'HTTP', SOCKS6: 'SOCKS6'}
SOCKS6_ERRORS = {int(code): code.text for code in Reply if code != Reply.SUCCEEDED}
SOCKS5_ERRORS = {code: text for code, text in SOCKS6_ERRORS.items() if code != Reply.TIMED_OUT}
SOCKS4_ERRORS = {int(code): code.text for code in Reply4 if code != Reply4.GRANTED}
DEFAULT_PORTS = {SOCKS4: 1080, SOCKS5: 1080, HTTP: 8080}
SETUP_TIMEOUT = 60.0                    # seconds, for callers that have no timeout of their own
KEEPIDLE = 60                           # seconds of silence before a `PlainEnd` is probed
INTERIM = {100, 102, 103}               # HTTP codes that precede the final one (RFC 9110 15.2)


def is_integer(value):
    """Whether `value` is an int, but not a bool: True as a port or a type is a mistake."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_port(value):
    return is_integer(value) and 0 <= value < 65536


class Proxy(NamedTuple):
    """A proxy and how to use it.  The six fields are those of PySocks' tuple, in its order.

    type        SOCKS4, SOCKS5, SOCKS6 or HTTP; plus TLS to speak it inside TLS; SOCKS5 plus
                GSSAPI to authenticate by GSSAPI, with all data encrypted, or only signed if the
                proxy chooses so; plus OPTIMISTIC to send all messages at once, see `Flight`; SOCKS5
                plus UDP_IN_TCP to have datagrams in the TCP connection, see open_association()
    addr        host name, IP address, or path of a unix socket, which begins with a slash
    port        0 or None: the default port of the type
    rdns        whether the proxy resolves names
    username    bytes; for SOCKS4, the userid; for GSSAPI, the service (default rcmd), or a
                principal, which has a slash
    password    bytes
    """
    type: int
    addr: str
    port: Optional[int] = None
    rdns: bool = True
    username: Optional[bytes] = None
    password: Optional[bytes] = None

    @classmethod
    def checked(cls, proxy_type: int, addr: Union[str, bytes], port: Optional[int] = None,
                rdns: bool = True, username: Secret = None, password: Secret = None) -> 'Proxy':
        """Make a `Proxy` from a caller's arguments.

        Raises GeneralProxyError for an invalid type, ValueError for any other argument.
        """
        kind = proxy_type & ~FLAGS if is_integer(proxy_type) else None
        if kind not in TYPE_NAMES:
            what = proxy_type if is_integer(proxy_type) else type(proxy_type).__name__
            raise GeneralProxyError(f'Invalid proxy type: {what}')
        addr = addr.decode() if isinstance(addr, bytes) else addr
        is_path = isinstance(addr, str) and addr.startswith('/')
        if is_path and not hasattr(socket, 'AF_UNIX'):
            raise ValueError('proxy address: this system has no unix sockets')
        if isinstance(addr, str) and not is_path and (
                set(addr) & set('/@') or ':' in addr and ip_bytes(addr.strip('[]')) is None):
            raise ValueError('proxy address: expected a name or an IP address, not a URL, and the '
                             'port by itself')
        if not isinstance(addr, str) or not addr or not is_path and min(addr) <= ' ':
            raise ValueError(f'proxy address {addr!r}: expected a name or an IP address')
        if port is not None and not is_port(port):
            raise ValueError(f'proxy port {port!r}: expected a number up to 65535')
        if isinstance(rdns, (str, bytes)):      # the user name, in a call that forgets rdns
            raise ValueError('rdns: expected True or False')
        if not all(isinstance(value or '', (str, bytes)) for value in (username, password)):
            raise ValueError('user name and password: expected str or bytes')
        username, password = encoded(username) or None, encoded(password) or None
        if proxy_type & GSSAPI and kind != SOCKS5:
            raise ValueError('GSSAPI: expected a proxy of type SOCKS5')
        if proxy_type & UDP_IN_TCP and kind not in (SOCKS5, SOCKS6):
            raise ValueError('udp=tcp: expected a proxy of type SOCKS5 or SOCKS6')
        if proxy_type & GSSAPI and (password or not is_utf8(username or b'')):
            raise ValueError('GSSAPI: expected a service name in UTF-8 and no password')
        if kind in (SOCKS5, SOCKS6):    # pack() checks the lengths (RFC 1929 section 2)
            Credentials(username or b'', password or b'').pack()
        if kind == SOCKS4 and username and (b'\0' in username or len(username) > MAX_USERID):
            raise ValueError(f'userid: expected at most {MAX_USERID} bytes, none of them 0')
        if kind == HTTP and username and b':' in username:      # RFC 7617 section 2
            raise ValueError('user name for an HTTP proxy: expected no colon')
        addr = addr[1:-1] if addr.startswith('[') and addr.endswith(']') else addr
        return cls(proxy_type, addr, port, rdns, username, password)

    def __repr__(self) -> str:
        secret = '' if self.username is None and self.password is None else ' with credentials'
        return f'<{self}{secret}>'

    def __str__(self) -> str:
        name = ''.join((TYPE_NAMES[self.kind], '+TLS' if self.type & TLS else '',
                        '+GSSAPI' if self.type & GSSAPI else ''))
        return f'{name} proxy {self.place}'

    @property
    def kind(self) -> int:
        """SOCKS4, SOCKS5, SOCKS6 or HTTP: the type without flags."""
        return self.type & ~FLAGS

    @property
    def credentials(self) -> Credentials:
        """User name and password, empty for None."""
        return Credentials(self.username or b'', self.password or b'')

    @property
    def is_optimistic(self) -> bool:
        """Whether it gets all messages at once, which it always does in SOCKS6."""
        return bool(self.type & OPTIMISTIC) or self.kind == SOCKS6

    @property
    def place(self):
        """Its path, or host and port, as text."""
        return self.addr if self.is_path else str(Address(self.addr, self.sure_port))

    def without_secrets(self) -> 'Proxy':
        """A copy without user name and password."""
        return self._replace(username=None, password=None)

    @property
    def is_path(self) -> bool:
        return self.addr.startswith('/')

    @property
    def sure_port(self) -> int:
        """The port, or the default one of the type."""
        is_https = self.kind == HTTP and self.type & TLS
        return self.port or (443 if is_https else DEFAULT_PORTS.get(self.kind, 1080))


def parse_proxy_url(url: str) -> Proxy:
    """Parse a proxy URL, SCHEME://[USER[:PASSWORD]@]HOST[:PORT][?PARAMETERS], into a `Proxy`.

    Schemes: socks6h, socks5h and socks4a (the proxy resolves names), socks6, socks5 and socks4
    (this host does), http, and https (HTTP inside TLS).  Suffixes: +tls for SOCKS inside TLS;
    +gssapi for GSSAPI, with the service as USER; +unix for a unix socket, whose path is the URL's
    path.  User and password are percent-decoded.  Parameters, with & between two: optimistic=1 has
    the proxy get all messages at once, see `Flight`; udp=tcp has datagrams inside the TCP
    connection to a proxy that supports it, where they would otherwise be beside it.

    Raises ValueError for anything else; its text never contains a password.
    """
    from urllib.parse import unquote, unquote_to_bytes, urlsplit
    try:
        parts = urlsplit(url)
    except ValueError:                  # whose text may contain the password
        raise ValueError('proxy URL: malformed') from None
    scheme, *layers = parts.scheme.split('+')
    if '://' not in url:                # an example with a password in it must not be shown
        example = url if re.match(r'[\w.-]+(:[0-9]+)?$', url) else 'HOST:PORT'
        raise ValueError(f'proxy URL: scheme missing, expected socks5h://{example} for example')
    if scheme not in SCHEMES or set(layers) - {'tls', 'gssapi', 'unix'}:
        raise ValueError(f'proxy URL: scheme {parts.scheme!r}, expected one of '
                         f'{", ".join(SCHEMES)}, with +tls, +gssapi or +unix')
    kind, rdns = SCHEMES[scheme]
    kind |= TLS * ('tls' in layers) | GSSAPI * ('gssapi' in layers)
    try:
        port = parts.port
    except ValueError:
        raise ValueError('proxy URL: bad port, expected a number up to 65535, IPv6 in brackets, '
                         'and %2F for "/" in a password') from None
    addr = parts.hostname
    if addr and ':' in addr:            # RFC 6874: %25 before a zone
        addr = addr.replace('%25', '%', 1)
    # socks5h://localhost/PATH is how curl writes a unix socket.
    if 'unix' in layers or addr == 'localhost' and len(parts.path) > 1:
        addr = unquote(parts.path)
        if not addr.startswith('/'):
            raise ValueError('proxy URL: expected the path of a unix socket')
    elif parts.path not in ('', '/'):
        raise ValueError('proxy URL: expected no path')
    # The text may be the rest of a password with "?" or "#" in it, so it is not shown.
    parameters = parts.query.split('&') if parts.query else []
    names = {parameter.partition('=')[0] for parameter in parameters}
    if set(parameters) - set(URL_PARAMETERS) or len(names) < len(parameters) or parts.fragment:
        raise ValueError('proxy URL: expected nothing behind "?" but optimistic=1 and udp=tcp, and '
                         'no "#"')
    kind |= sum(URL_PARAMETERS[parameter] for parameter in parameters)
    if not addr:
        raise ValueError('proxy URL: host missing')
    username, password = (text and unquote_to_bytes(text)
                          for text in (parts.username, parts.password))
    return Proxy.checked(kind, addr, port, rdns, username, password)


def parse_chain(proxy: ProxyArgument, flags: int = 0) -> List[Proxy]:
    """Parse a `proxy` argument into a chain: a list of `Proxy`, the nearest one first.

    The argument is a URL, a tuple of set_proxy()'s arguments, a list of these, or None.  `flags`
    are added to all types.  Raises ValueError or GeneralProxyError if it is none of them.
    """
    if not proxy:
        return []
    if isinstance(proxy, list):
        chain = [each for item in proxy for each in parse_chain(item, flags)]
        if any(each.is_path for each in chain[1:]):     # a proxy connects to host and port only
            raise ValueError('proxy chain: a unix socket can only be the first proxy')
        return chain
    if isinstance(proxy, str):
        proxy = parse_proxy_url(proxy)
    elif not isinstance(proxy, tuple) or len(proxy) > 6:
        raise ValueError(f'proxy: expected a URL, a tuple or a list, not {type(proxy).__name__}')
    elif proxy[0] is None or isinstance(proxy[0], (str, list)):     # see proxy_tuple()
        return parse_chain(proxy[0], flags)
    proxy = Proxy.checked(*proxy)
    return [proxy._replace(type=proxy.type | flags)]


def is_bypassed(host: str, patterns: str, port: Optional[int] = None) -> bool:
    """Whether `patterns` exempt `host` from the proxy, as curl and urllib read NO_PROXY.

    patterns    separated by commas or spaces:
                NAME or .NAME   the name and its subdomains
                *.NAME          the subdomains only
                IP or NETWORK   an address, or those of 10.0.0.0/8; IPv6 with or without brackets
                *               every host
                HOST:PORT       any of these, for this `port` only
    """
    if not patterns:
        return False
    host = host.partition('%')[0]
    with contextlib.suppress(ValueError):       # as it is sent; canonical() takes fewer names
        host = name_bytes(host).decode().lower()
    with contextlib.suppress(ProtocolError):    # no valid name, but "*" matches it, too
        host = canonical(Address(host, 0)).host
    return any(matches(pattern, host, port)
               for pattern in patterns.lower().replace(',', ' ').split())


def matches(pattern, host, port):
    """Whether one pattern of is_bypassed() matches a canonical host and a port."""
    rest, colon, number = pattern.rpartition(':')
    # With more colons and no brackets, it is an IPv6 address without a port.
    if colon and number.isdecimal() and (':' not in rest or rest.endswith(']')):
        if int(number) != port:
            return False
        pattern = rest
    if pattern == '*':
        return True
    ip = plain_ip(host)
    if ip:
        with contextlib.suppress(ValueError):
            network = ipaddress.ip_network(pattern.strip('[]'), strict=False)
            return ipaddress.ip_address(ip) in network
        return False
    is_wildcard = pattern.startswith('*.')
    name = pattern[2 * is_wildcard:].strip('.')
    with contextlib.suppress(ValueError):       # a pattern that cannot be a name matches nothing
        name = name_bytes(name).decode()
    return bool(name) and (host.endswith('.' + name) or host == name and not is_wildcard)


def proxy_from_environment(host: Optional[str] = None, port: Optional[int] = None) -> Optional[str]:
    """The URL in all_proxy or ALL_PROXY; None if unset, or if no_proxy or NO_PROXY exempts `host`
    (and `port`), see is_bypassed()."""
    url, bypass = (os.environ.get(name) or os.environ.get(name.upper())
                   for name in ('all_proxy', 'no_proxy'))
    return None if not url or host and bypass and is_bypassed(host, bypass, port) else url


# The error of a proxy goes up to the program.  A frame that it has passed must not have a variable
# for it: such a cycle would keep the frames of all callers, and what they hold, until a collection.
# So the errors are made by functions, and these context managers are no generators, whose frames
# would be in a cycle with those of contextlib.

class negotiating:
    """Context manager: turn errors of a negotiation with `proxy` for `target` into PySocks'.

    The error raised is a GeneralProxyError with the cause as `socket_err`.  If the cause is a
    GeneralProxyError itself, it has the same class: programs written for PySocks look at one or
    the other.
    """

    def __init__(self, proxy, target):
        self._proxy, self._target = proxy, target

    def __enter__(self):
        return self

    def __exit__(self, _, error, traceback):
        if isinstance(error, (OSError, EOFError)):
            raise negotiation_error(error, self._proxy, self._target) from error


def negotiation_error(error, proxy, target):
    """The error that negotiating() raises for another one."""
    cause = GeneralProxyError(str(error)) if isinstance(error, EOFError) else error
    kind = type(cause) if isinstance(cause, GeneralProxyError) else (
        ProxyTimeoutError if is_timeout(cause) else GeneralProxyError)
    wrapped = kind('Socket error', cause, reply_for(cause))
    wrapped.proxy, wrapped.target = proxy.without_secrets(), target
    if isinstance(cause, HTTPError):
        wrapped.status = cause.status
    wrapped.errno = (errno.EACCES if isinstance(cause, SOCKS5AuthError) else system_errno(cause)
                     or REPLY_ERRNOS.get(wrapped.reply, errno.ECONNABORTED))
    return wrapped


def system_errno(error):
    """The errno of an OSError; None for the resolver's and OpenSSL's, which mean something else."""
    return None if isinstance(error, socket.gaierror) or hasattr(error, 'library') else error.errno


def returned_errno(error):
    """What connect_ex() returns for an error; None if it raises the error, as in stock."""
    cause = getattr(error, 'socket_err', error)
    if isinstance(cause, socket.timeout) and not cause.errno:
        return errno.EAGAIN
    return None if isinstance(cause, socket.gaierror) else system_errno(error)


def request_from(stream, proxy, command, address):
    """Conversation: request `command` for `address` from `proxy`; the `Address` in its reply, BND.

    Raises SOCKS5AuthError, SOCKS5Error, SOCKS4Error or HTTPError if the proxy refuses.
    """
    if proxy.kind == SOCKS5 and not proxy.type & GSSAPI:    # open_gssapi() has authenticated
        yield from authenticate5(stream, proxy)
    # Not before the greeting: that is PySocks' order, on which fake proxies of test suites rely.
    address = yield from as_requested(proxy, address, stream.until)
    yield from stream.write(request_message(proxy, command, address))
    return (yield from read_answer(stream, proxy.kind))


def as_requested(proxy, address, until):
    """Conversation: `address`, or one of its IP addresses if the proxy does not resolve names."""
    if not is_resolved_here(proxy, address):
        return address
    found = yield from resolve(address, until)
    # SOCKS4 has no IPv6: take an IPv4 address if there is one.
    address = min(found, key=lambda address: proxy.kind == SOCKS4 and ':' in address.host)
    if proxy.kind == SOCKS4 and ':' in address.host:
        raise SOCKS4Error(f'{address.host}: SOCKS4 has no IPv6 addresses')
    return address


def is_resolved_here(proxy, address):
    return not proxy.rdns and ip_bytes(address.host) is None


def request_message(proxy, command, address):
    """The message that requests `command` for `address`."""
    if proxy.kind == SOCKS5:
        return Request(command, address)
    if proxy.kind == SOCKS4:
        return Request4(command, address, proxy.username or b'')
    if proxy.kind == SOCKS6:
        if command != Command.CONNECT:  # ADDR is where to listen
            address = UNSPECIFIED
        options = (Option.of(proxy.credentials),) * any(proxy.credentials)
        return Request6(command, address, options)
    if command != Command.CONNECT:
        raise HTTPError('HTTP proxies support CONNECT only', reply=Reply.COMMAND_NOT_SUPPORTED)
    return HttpConnect(address, b':'.join(proxy.credentials) if any(proxy.credentials) else b'')


def read_answer(stream, kind):
    """Conversation: read the answer to request_message(); the `Address` in it."""
    if kind == HTTP:
        return (yield from read_http_answer(stream))
    return (yield from stream.read(ANSWERS[kind]))


def authenticate5(stream, proxy):
    """Conversation: method negotiation and login of SOCKS5 (RFC 1928 section 3, RFC 1929).

    One message at a time, each in one send(), without pipelining: some proxies, and the mocks of
    test suites, expect a message to be all that one recv() returns.
    """
    offered = b'\0\2' if any(proxy.credentials) else b'\0'
    yield from stream.write(Greeting(offered))
    method = (yield from stream.read(Choice.unpack)).method
    if method == Method.NO_ACCEPTABLE:
        raise SOCKS5AuthError('All offered SOCKS5 authentication methods were rejected')
    if method not in offered:
        if method == Method.USERNAME_PASSWORD:
            raise SOCKS5AuthError('No username/password supplied. Server requested '
                                  'username/password authentication')
        raise ProtocolError(f'the proxy chose method {method:#04x}, which was not offered')
    if method == Method.USERNAME_PASSWORD:
        yield from stream.write(proxy.credentials)
        check_verdict((yield from stream.read(Verdict.unpack)))


def check_verdict(verdict):
    if verdict.status:
        raise SOCKS5AuthError('SOCKS5 authentication failed')


def unpack_choice_or_verdict(read):
    """Decoder of the first answer to a greeting and a password: Tor leaves out the `Choice` if it
    gets both at once."""
    answer = read(2)
    read, _ = reader(answer)
    return (Verdict if answer[0] == 1 else Choice).unpack(read)


def unpack_answers6(read):
    """Decoder of both SOCKS6 replies to a request: BND."""
    if Verdict6.unpack(read).status:
        raise SOCKS5AuthError('SOCKS6 authentication failed')
    return unpack_answer6(read)


def unpack_answer6(read):
    """Decoder of a SOCKS6 operation reply: BND."""
    code, address, _ = Response6.unpack(read)
    if code:
        raise SOCKS5Error(f'{code:#04x}: {SOCKS6_ERRORS.get(code, "Unknown error")}',
                          reply=Reply.TTL_EXPIRED if code == Reply.TIMED_OUT else code)
    return address


def unpack_peer6(expected, read):
    """Decoder of the second reply to BIND: the peer, which must be the `Address` expected."""
    address = unpack_answer6(read)
    if expected.host not in (*ZEROS, address.host):
        raise SOCKS5Error(f'only {address} came', reply=Reply.NOT_ALLOWED)
    return address


def unpack_answer5(read):
    """Decoder of a SOCKS5 reply: BND (RFC 1928 section 6).

    A refusal is raised without reading on: some proxies send its first bytes only.
    """
    code = Response.unpack_reply(read)
    if code:
        raise SOCKS5Error(f'{code:#04x}: {SOCKS5_ERRORS.get(code, "Unknown error")}', reply=code)
    return Address.unpack(read)


def unpack_answer4(read):
    """Decoder of a SOCKS4 reply: the address in it."""
    code, address = Response4.unpack(read)
    if code != Reply4.GRANTED:
        raise SOCKS4Error(f'{code:#04x}: {SOCKS4_ERRORS.get(code, "Unknown error")}')
    return address


# Decoders of the answer to a request; all return BND.
ANSWERS = {SOCKS4: unpack_answer4, SOCKS5: unpack_answer5, SOCKS6: unpack_answers6}


def read_http_answer(stream):
    """Conversation: read the head of an HTTP proxy's answer; UNSPECIFIED, as it names no address.

    Interim answers are skipped.  Raises HTTPError unless the code is 2xx.
    """
    code = None
    for _ in range(MAX_LINES):
        if not code:
            code, phrase = yield from stream.read(HttpStatus.unpack)
            if not 200 <= code < 300 and code not in INTERIM:
                note = ('; the proxy may not support tunnels (CONNECT)'
                        if code in (400, 403, 405) else '')
                error = HTTPError(f'{code}: {printable_line(phrase)}{note}')
                error.status = code
                raise error
        elif not (yield from stream.read(http_line)):   # the empty line ends the head
            if code not in INTERIM:
                return UNSPECIFIED
            code = None
    raise ProtocolError(f'more than {MAX_LINES} lines in the head of an HTTP answer')


class NotAnswered(Exception):
    """A proxy does not cope with OPTIMISTIC, but may be asked once more, in the ordinary way."""


class Packed(bytes):
    """Messages for write() that are packed already."""

    def pack(self):
        return self


class Flight(ExactStream):
    """The stream to proxies of a chain that get all at once (OPTIMISTIC): the greeting with one
    method, the credentials, the request; the same for the next proxies; the first data.

    One round trip is enough then.  User name and password are sent before the proxy has asked for
    them, which RFC 1929 does not forbid: they are for this proxy, and in the clear in any case.

    Theory of operation.  A proxy passes on what follows a request only after it has connected, so
    that nothing reaches another party if it fails; but an HTTP proxy may take it for a further
    request, so nothing follows there.  Proxies that do not cope lose what follows a message, close
    the connection or choose another method.  Then NotAnswered is raised, to begin again in the
    ordinary way, and the proxy is asked in that way for STEPWISE seconds.

    A second connection must not deliver data twice:

    - Data goes along to a first proxy with a password, and to proxies that have coped before in
      this process; if these are silent, they are still connecting.
    - After silence or an end, a second connection is made if no data went along, or if the proxy
      has not answered the password, which it does before it reads the request.
    - An end counts only if it is a regular one, of the first proxy: a reset may overtake an answer.
      To a silent proxy, this side's direction is ended, so that it ends, too.

    left        number of proxies whose answers are still to come
    has_data    whether the first data went along
    """
    SEGMENT = 1024          # bytes; fits in a segment, and in the first recv() of small servers
    PATIENCE = 6.0          # seconds for an answer; a name server that is down takes 5
    STEPWISE = 600.0        # seconds
    known: Dict[Proxy, float] = {}      # 0 if a proxy copes, else the time until which it does not

    def __init__(self, sock, until, is_first):
        super().__init__(sock, until)
        self.left = 0
        self.has_data = False
        self._is_first = is_first       # whether `sock` leads to the first proxy
        self._proxies = []              # those that get messages
        self._is_single = False         # one message only, which is the ordinary way
        self._may_repeat = False        # whether a second connection may be made after a failure
        self._has_ended = False         # this side's direction

    @classmethod
    def state(cls, proxy):
        """What is `known` of a proxy, None for nothing; in SOCKS6, all cope."""
        return cls.known.get(proxy.without_secrets(), 0 if proxy.kind == SOCKS6 else None)

    @classmethod
    def suits(cls, chain):
        """Whether to try it with any proxy of the chain."""
        return any(proxy.is_optimistic for proxy in chain) and not any(
            (cls.state(proxy) or 0) > time.monotonic() for proxy in chain)

    @classmethod
    def note(cls, proxy, copes):
        """Remember whether a proxy has coped; one failure of one that did before means little."""
        if len(cls.known) > 1024:
            cls.known.clear()
        before = cls.state(proxy)
        cls.known.pop(proxy.without_secrets(), None)
        if copes or before != 0:
            cls.known[proxy.without_secrets()] = 0 if copes else deadline(cls.STEPWISE)

    def start(self, hops, command, data):
        """Conversation: send the messages to the first proxies of `hops`, and the data if it fits.

        hops    list of (proxy, target)
        """
        packed = []
        for proxy, target in hops:
            if packed and (not proxy.is_optimistic or proxy.type & (TLS | GSSAPI)
                          or is_resolved_here(proxy, target)):
                break
            target = yield from as_requested(proxy, target, self.until)
            is_last = len(self._proxies) == len(hops) - 1
            more = self.messages(proxy, command if is_last else Command.CONNECT, target)
            if packed and len(b''.join(packed + more)) > self.SEGMENT:
                break
            packed += more
            self._proxies.append(proxy)
            if proxy.kind == HTTP:
                break
        else:
            self.has_data = bool(data) and len(b''.join(packed) + data) <= self.SEGMENT
        self.left = len(self._proxies)
        unknown = [number for number, proxy in enumerate(self._proxies) if self.state(proxy) != 0]
        if unknown and (unknown != [0] or not self._is_first
                        or self.method(self._proxies[0]) != Method.USERNAME_PASSWORD):
            self.has_data = False
        packed += [data] * self.has_data
        self._is_single = len(packed) == 1
        self._may_repeat = bool(unknown) and not self._is_single
        with contextlib.suppress(ConnectionError):      # reading tells more: there may be an answer
            yield from self.write(Packed(b''.join(packed)))

    @staticmethod
    def method(proxy):
        """The only method to offer; None if the proxy does not ask for one, or has done so."""
        if proxy.kind != SOCKS5 or proxy.type & GSSAPI:
            return None
        return Method.USERNAME_PASSWORD if any(proxy.credentials) else Method.NO_AUTHENTICATION

    def messages(self, proxy, command, address):
        """A list of all messages to one proxy, packed."""
        method, messages = self.method(proxy), [request_message(proxy, command, address)]
        if method is not None:
            messages[:0] = [Greeting(bytes((method,)))] + [proxy.credentials] * bool(method)
        return [message.pack() for message in messages]

    def answers(self, proxy):
        """Conversation: read the answers of the next proxy; the `Address` in the last one, BND."""
        self.left -= 1
        try:
            yield from self._log_in(self.method(proxy))
            self._may_repeat = self._may_repeat and not self.has_data
            bnd = yield from read_answer(self, proxy.kind)
        except (SOCKS5AuthError, SOCKS5Error, SOCKS4Error, HTTPError):
            self.note(proxy, True)      # an answer like any other
            raise
        except (OSError, EOFError, NotAnswered) as error:
            is_end = isinstance(error, EOFError) and not self.surplus   # else half an answer
            may_repeat = self._may_repeat and (is_end or not self.has_data)
            if not self._is_single:
                self.note(proxy, False)
            if may_repeat or isinstance(error, NotAnswered):
                raise NotAnswered(f'{proxy}: {reason(error)}') from None
            raise
        if self._has_ended:
            raise socket.timeout('the proxy has connected too late')
        if not self.left:
            for proxy in self._proxies:
                self.note(proxy, True)
        return bnd

    def _log_in(self, method):
        """Conversation: read the answers to the greeting and to the password."""
        if method is None:
            return
        answer = yield from self.read(unpack_choice_or_verdict if method else Choice.unpack)
        if isinstance(answer, Choice):
            if answer.method != method:
                raise NotAnswered('it has chosen another method')
            answer = method and (yield from self.read(Verdict.unpack))
        if method:
            check_verdict(answer)

    def read(self, unpack):
        """As before; but if a second connection may be made, wait for PATIENCE seconds at most, or
        for half of the time that is left, and with data, once more after the end of this side's
        direction."""
        if not self._may_repeat:
            return (yield from super().read(unpack))
        until, now = self.until, time.monotonic()
        self.until = now + min(self.PATIENCE, (until - now) / 2 if until else self.PATIENCE)
        try:
            return (yield from super().read(unpack))
        except socket.timeout:
            if not self.has_data or self._has_ended:
                raise
            self._has_ended = True
            self.sock.shutdown(socket.SHUT_WR)
        finally:
            self.until = until
        return (yield from self.read(unpack))


# Theory of operation.  A program gets a socket with a descriptor, which it may poll, duplicate or
# wrap in TLS, even where the proxy is inside TLS or GSSAPI.  So a layer is not that socket: a
# TCP connection within this host is made, one end of which, `PlainEnd`, is the program's.  A
# `Tunnel` joins the other end to the layer, in a background loop that all of them share.

class NoSession:
    """Stand-in for the session of a tunnel to a layer: no log line, no limits.

    A `PlainEnd` that is closed looks half-closed from here.  Where the loop cannot watch for the
    reset that follows, `linger` (seconds) bounds how long such a tunnel is kept.
    """
    address, key, idle_timeout, linger = 'a layer', None, 0, 0 if ERRORS else 300.0
    is_sending = False                  # whether a task has what the program has sent

    def end(self, *_):
        """Called by the tunnel at its end; there is no line to log."""


def background_loop():
    """The `Loop` of this process for layers, running in a daemon thread."""
    return background_loop_of(os.getpid())      # threads do not survive a fork


@functools.lru_cache(1)
def background_loop_of(_):
    loop = Loop()
    threading.Thread(target=loop.run, name='socks-tls', daemon=True).start()
    atexit.register(flush_at_exit, loop)
    if hasattr(os, 'register_at_fork'):         # since Python 3.7
        os.register_at_fork(after_in_child=functools.partial(leave_to_parent, loop))
    return loop


def leave_to_parent(loop):
    """In the child of a fork, close its copies of the loop's descriptors.

    Else the program's sockets, which the child has too, would not end with the parent that serves
    them, but be silent.
    """
    atexit.unregister(flush_at_exit)
    if loop.closed:                     # by an earlier fork
        return
    loop.closed = True
    for item in [*(item for item, _, _ in loop._inbox), *loop.items]:
        is_tunnel = isinstance(item, Tunnel)
        for sock in [item.up.source, item.down.source] if is_tunnel else [item._sock]:
            below_layers(sock).close()          # the close() of a layer would send something
    loop._poller.close()
    loop.waker.close()


def flush_at_exit(loop, patience=5.0):
    """Wait, for `patience` seconds at most, until all that the program sent has left the loop.

    For atexit: the loop's daemon thread ends with the interpreter, whatever it still holds.
    """
    until = deadline(patience)
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError):      # the loop has closed a socket meanwhile
            items = list(loop.items)
            pipes = [item.up for item in items if isinstance(item, Tunnel)]
            if not (any(item.client.is_sending for item in items if isinstance(item, Task))
                    or any(pipe.load or not pipe.done and poll([pipe.source], (), time.monotonic())
                           for pipe in pipes)):
                return
        time.sleep(0.01)


def load_authorities(context, name, path):
    """Have an ssl.SSLContext trust the certificates in a PEM file, which an option or variable
    `name` names; FileError if there are none."""
    try:
        open(path, 'rb').close()        # the errors of ssl do not tell a directory
        context.load_verify_locations(path)
    except OSError as error:
        is_read = hasattr(error, 'library')     # an ssl.SSLError
        fault = 'expected a certificate, as PEM' if is_read else reason(error)
        raise FileError(f'{name} {path}: {fault}') from None


def certificate_places():
    """The values of the environment variables that say where trusted certificates are."""
    return [os.environ.get(name) for name in ('SSL_CERT_FILE', 'SSL_CERT_DIR')]


@functools.lru_cache(4)
def usual_context(*_):
    """The ssl.SSLContext for proxies whose caller gave none, by certificate_places().

    Cached, because loading the trusted certificates is slow.
    """
    import ssl
    return ssl.create_default_context()


def trust_advice(path):
    """The end of the error of a certificate that usual_context() does not trust; `path` is the
    value of SSL_CERT_FILE, or None."""
    import ssl
    try:
        if path:
            load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), 'SSL_CERT_FILE', path)
        place = f'{path} (SSL_CERT_FILE)' if path else 'the file that SSL_CERT_FILE names'
        return f'; expected the certificate that signed it in {place}'
    except FileError as error:
        return f'; {error}'


def open_tls(sock, proxy, context, until):
    """Conversation: start TLS to `proxy` over a duplicate of `sock`; a `PlainEnd` of it."""
    is_usual = not context
    context = context or usual_context(*certificate_places())
    name = 'localhost' if proxy.is_path else proxy.addr.partition('%')[0]
    keep_urgent(sock)                   # a byte taken out would corrupt a TLS record
    tls = TlsLayer(sock.dup(), context, server_hostname=name)
    with owned(tls):
        try:
            yield from tls.handshake(until)
        except OSError as error:
            # OpenSSL's codes for issuers that are missing or not trusted; Python 3.6 has none.
            if (is_usual and getattr(error, 'reason', '') == 'CERTIFICATE_VERIFY_FAILED'
                    and getattr(error, 'verify_code', 2) in (2, 18, 19, 20, 21)):
                error.strerror += trust_advice(certificate_places()[0])
            raise
        return expose(tls)


class PlainEnd(_orig_socket):
    """The plain TCP socket that a program gets instead of a layer.

    context     the `GssContext` that protects datagrams of an association, or None
    layer       the `Layer`
    """
    __slots__ = ('context', 'layer')

    @property
    def fault(self):
        """Why the tunnel has reset this end, where the layer knows it; else None."""
        return self.layer.fault


def expose(layer, context=None):
    """A non-blocking `PlainEnd` for `layer`, which belongs to the background loop from now on."""
    near, far = tcp_pair()
    if hasattr(socket, 'TCP_KEEPIDLE'):
        # A closed `PlainEnd` looks half-closed; it answers a probe by RST, which ends the tunnel.
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPIDLE)
    plain = PlainEnd(near.family, socket.SOCK_STREAM, 0, near.detach())
    plain.setblocking(False)
    plain.context, plain.layer = context, layer
    tunnel, loop = Tunnel(NoSession(), far, layer), background_loop()
    loop.call(tunnel, tunnel.start, loop)
    # Data that came with the end of the handshake is in the layer; the socket will not tell of it.
    loop.call(tunnel, tunnel.down.fill)
    return plain


def open_gssapi(sock, proxy, in_sequence, until):
    """Conversation: authenticate to `proxy` by GSSAPI over `sock`, and protect all that follows
    (RFC 1961); a `PlainEnd` of that.

    in_sequence     whether messages come in order: false where the context is for datagrams, too
    """
    stream = ExactStream(sock, until)
    yield from stream.write(Greeting(bytes((Method.GSSAPI,))))
    if (yield from stream.read(Choice.unpack)).method != Method.GSSAPI:
        raise SOCKS5AuthError('The SOCKS5 proxy does not accept GSSAPI')
    try:
        context = yield from initiate_gssapi(stream, proxy, in_sequence)
    except GssError as error:
        raise SOCKS5AuthError(printable_line(error.strerror)) from None
    keep_urgent(sock)                   # as in open_tls()
    layer = GssLayer(sock.dup(), context)
    with owned(layer):
        return expose(layer, context)


def initiate_gssapi(stream, proxy, in_sequence):
    """Conversation: establish a `GssContext` with the proxy and agree on its protection level
    (RFC 1961 sections 3 and 4); the context.

    With run(), the timeout is not observed while the library talks to a KDC.  The same is true of
    name look-ups: both block inside a C library.
    """
    service = name_text(proxy.username or b'rcmd')
    host = 'localhost' if proxy.is_path else proxy.addr.partition('%')[0]
    context = GssContext(service if '/' in service else f'{service}@{host}', in_sequence)
    token, complete = yield Call(context.step, stream.until)
    while True:
        if token:
            yield from stream.write(GssMessage(GssMessage.TOKEN, token))
        if complete:
            break
        token = yield from read_token(stream, GssMessage.TOKEN)
        token, complete = yield Call(functools.partial(context.step, token), stream.until)
    # Signed but not encrypted, as the level is only being agreed on (RFC 1961 section 4).
    best = bytes((max(level for level in range(3) if context.allows(level)),))
    yield from stream.write(GssMessage(GssMessage.LEVEL, context.wrap(best, False)))
    level, _, _ = context.unwrap((yield from read_token(stream, GssMessage.LEVEL)))
    if level not in (b'\1', b'\2'):
        raise SOCKS5AuthError(f'The proxy chose GSSAPI level {level.hex()}, expected 01 or 02')
    context.level = level[0]
    return context


def read_token(stream, kind):
    """Conversation: the token of the next message, which must be of this kind."""
    message = yield from stream.read(GssMessage.unpack)
    if message.kind != kind:
        raise SOCKS5AuthError('The SOCKS5 proxy rejected the GSSAPI authentication')
    return message.token


class connecting:
    """Context manager: turn an OSError of connecting to `proxy` into a ProxyConnectionError."""

    def __init__(self, proxy):
        self._proxy = proxy

    def __enter__(self):
        return self

    def __exit__(self, _, error, traceback):
        if isinstance(error, OSError):
            raise connection_error(error, self._proxy) from error


def connection_error(error, proxy):
    """The error that connecting() raises for another one."""
    kind = ProxyConnectionTimeoutError if is_timeout(error) else ProxyConnectionError
    wrapped = kind(f'Error connecting to {proxy}', error)
    wrapped.proxy, wrapped.errno = proxy.without_secrets(), system_errno(error)
    return wrapped


def await_connect(sock, address, until):
    """Conversation: connect the non-blocking `sock` to `address`, a tuple or a path."""
    try:
        sock.connect(address)
    except BLOCKED:
        yield from wait_ready((), [sock], until)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error)) from None
        # Linux reports a success once more.  This takes it, so that a program's own connect() later
        # raises EISCONN, as on other systems.  A unix socket is still not connected if the queue of
        # its peer is full, although it is writable.
        error = sock.connect_ex(address)
        if error in UNDER_WAY:
            raise OSError(error, os.strerror(error)) from None


def connect_by_name(host, port, until=None, source=(), family=0):
    """Conversation: a non-blocking socket, connected to a host of the user's choice.

    A name is looked up by the rules of the system, search domains included, unlike the names that
    clients send.  `source` has local addresses, see dial().  An address of `family` is tried first.
    """
    found = yield Call(functools.partial(look_up, host, port), until)
    found = sorted(found, key=lambda info: info[0] != family)
    addresses = dict.fromkeys(Address.with_zone(sockaddr) for *_, sockaddr in found)
    return (yield from dial(list(addresses), until, source))


def connect_to_proxy(proxy, until=None, source=(), family=0):
    """Conversation: a non-blocking socket, connected to `proxy`, over `family` if possible.

    Raises ProxyConnectionError.
    """
    with connecting(proxy):
        if not proxy.is_path:
            return (yield from connect_by_name(proxy.addr, proxy.sure_port, until, source, family))
        sock = _orig_socket(socket.AF_UNIX)
        with owned(sock):
            sock.setblocking(False)
            yield from await_connect(sock, proxy.addr, until)
            return sock


def destination(pair, chain):
    """The `Address` for a caller's (host, port, ...).

    Raises GeneralProxyError if it is malformed, or if a proxy of the chain cannot be asked for its
    target by its protocol: checked here for all, before anything is sent.
    """
    if not (isinstance(pair, (tuple, list)) and 2 <= len(pair) <= 4 and pair[0]
            and isinstance(pair[0], (str, bytes, bytearray)) and is_port(pair[1])):
        raise GeneralProxyError(f'Invalid destination-connection (host, port) pair: {pair!r}')
    host = pair[0] if isinstance(pair[0], str) else name_text(pair[0])
    bare = without_brackets(host)
    address = Address(plain_ip(bare.partition('%')[0] if ':' in bare else bare) or host, pair[1])
    if ip_bytes(address.host) is None:
        address = Address(name_to_send(host), pair[1])
    for proxy, (host, _) in hops_of(chain, address):
        if proxy.kind == SOCKS4 and ':' in host:
            raise SOCKS4Error(f'{host}: SOCKS4 has no IPv6 addresses')
        if ip_bytes(host) is None:
            name_to_send(host)
    return address


def hops_of(chain, address):
    """A list of (proxy, what it is asked for): the next proxy, and the last one for `address`."""
    following = [Address(proxy.addr, proxy.sure_port) for proxy in chain[1:]]
    return list(zip(chain, [*following, address]))


def negotiate_chain(sock, chain, command, address, until=None, context=None, data=b'',
                    at_once=False):
    """Conversation: have each proxy of the chain connect to the next one, and the last one do
    `command` for `address`; the socket to go on with, and BND.

    `sock` is connected to the first proxy.  The socket returned is `sock`, or a `PlainEnd` if there
    is a layer in between.  Each layer works on a duplicate of the socket below it.

    context     ssl.SSLContext for proxies inside TLS, None for the usual one
    data        the first bytes for the target
    at_once     whether to use a `Flight` where a proxy is OPTIMISTIC; may raise NotAnswered then
    """
    ends = [sock]
    try:
        bnd = yield from negotiate_hops(ends, hops_of(chain, address), command, until, context,
                                        data, at_once)
    except BaseException:
        for plain in ends[1:]:          # by RST, which makes the background loop drop the layers
            abort(plain)
        raise
    for plain in ends[1:-1]:
        plain.close()
    return ends[-1], bnd


def negotiate_hops(ends, hops, command, until, context, data, at_once):
    """Conversation: negotiate with each proxy of negotiate_chain() in turn; BND.

    ends    list with the socket to the first proxy; the `PlainEnd` of each layer is appended
    hops    list of (proxy, target)
    """
    flight = None
    for index, (proxy, target) in enumerate(hops):
        is_last = index == len(hops) - 1
        step = command if is_last else Command.CONNECT
        with negotiating(proxy, target):
            if proxy.type & TLS:
                ends.append((yield from open_tls(ends[-1], proxy, context, until)))
            if proxy.type & GSSAPI:
                ends.append((yield from open_gssapi(
                    ends[-1], proxy, step != Command.UDP_ASSOCIATE, until)))
            stream = ExactStream(ends[-1], until)
            if at_once and proxy.is_optimistic and not (flight and flight.left):
                flight = Flight(ends[-1], until, not index)
                yield from flight.start(hops[index:], command, data)
            if flight and flight.left:
                bnd = yield from flight.answers(proxy)
            else:
                bnd = yield from request_from(stream, proxy, step, target)
            if data and is_last and not (flight and flight.has_data):
                yield from stream.write(Packed(data))
    return bnd


def open_chain(chain, address, until=None, source=(), context=None, command=Command.CONNECT,
               data=b'', connect=None):
    """Conversation: connect to the first proxy and negotiate_chain(); its socket, and BND.

    For BIND and UDP_ASSOCIATE, BND is an address that can be reached from here.  `connect` is what
    to use instead of connect_to_proxy(); it is called again if the proxy does not cope with a
    `Flight`.
    """
    connect = connect or functools.partial(connect_to_proxy, chain[0], until, source)
    at_once = Flight.suits(chain)
    while True:
        sock = yield from connect()
        try:
            with owned(sock):
                last, bnd = yield from negotiate_chain(sock, chain, command, address, until,
                                                       context, data, at_once)
            break
        except NotAnswered as error:
            log.debug('%s; connecting again, one message at a time', error)
            at_once = False
    with owned(sock, last):
        if command in (Command.BIND, Command.UDP_ASSOCIATE):
            bnd = yield from usable_bnd(bnd, chain, sock, until)
    if last is not sock:
        sock.close()
    return last, bnd


def ask_for(command, chain, address, until, source):
    """Conversation: the host that the last proxy answers to RESOLVE or RESOLVE_PTR (Tor's
    socks-extensions), for the host of `address`.

    Raises GeneralProxyError, also if it is none of the right kind.
    """
    sock, (answer, _) = yield from open_chain(chain, destination(address, chain), until, source,
                                              command=command)
    sock.close()
    host, is_lookup = plain_ip(answer), command == Command.RESOLVE
    if (host is not None) != is_lookup or host in ZEROS:
        raise ProtocolError(f'the proxy has answered {printable(answer)}, expected '
                            + ('an IP address' if is_lookup else 'a name'))
    return host or canonical(Address(answer, 0)).host


def open_association(chain, source_port, until=None, source=(), context=None, connect=None):
    """Conversation: have the last proxy relay datagrams; (form, socket, BND), the last two as from
    open_chain(), and the form of the datagrams in the connection, or None if they are beside it.

    A single proxy is asked for UDP_ASSOCIATE, and if it does not support that, for UDP_IN_TCP; the
    other way round if UDP may not reach it: it is on a unix socket, or its type has UDP_IN_TCP.  In
    a chain, or inside TLS, which does not cover datagrams beside it, UDP_IN_TCP is the only way.

    source_port     of the UDP socket.  Its host is not sent: behind a NAT, the proxy sees another.
    connect         as in open_chain()
    """
    last = chain[-1]
    try:
        expect_udp(chain)
    except ValueError as error:
        raise unsupported(str(error)) from None
    commands = [Command.UDP_ASSOCIATE, Command.UDP_IN_TCP]
    if last.kind == SOCKS6:             # has both ways in the first one
        del commands[1]
    elif len(chain) > 1 or last.type & TLS:
        del commands[0]
    elif last.is_path or last.type & UDP_IN_TCP:
        commands.reverse()
    address, refusal = destination(('0.0.0.0', source_port), chain), None
    for command in commands:
        try:
            sock, bnd = yield from open_chain(chain, address, until, source, context, command,
                                              connect=connect)
            form = StreamedDatagram if command == Command.UDP_IN_TCP else None
            if last.kind == SOCKS6:
                form = yield from begin_in_connection(sock, last, address, until)
            return form, sock, bnd
        except GeneralProxyError as error:
            is_unknown = error.reply == Reply.COMMAND_NOT_SUPPORTED
            if not (refusal or is_unknown and error.proxy == last.without_secrets()):
                raise
            refusal = refusal or error
    if len(commands) > 1:
        raise refusal
    raise unsupported('UDP through TLS or several proxies needs a last proxy with UDP inside TCP '
                      '(command 05)', refusal)


def begin_in_connection(sock, proxy, address, until):
    """Conversation: decide that the datagrams of a SOCKS6 association go in its TCP connection, by
    one without a target; the `Form6`.

    The confirmation comes now, so that whatever comes later is a datagram.  After an error, `sock`
    is closed.
    """
    with owned(sock), negotiating(proxy, address):
        stream = ExactStream(sock, until)
        begun = yield from stream.read(Message6.unpack)
        form = Form6(begun.association)
        yield from stream.write(form(Datagram(UNSPECIFIED, b'').pack()))
        confirmed = yield from stream.read(Message6.unpack)
        if begun.kind != Message6.BEGUN or confirmed != form(b''):
            raise ProtocolError('SOCKS6 association: expected messages of the types 1 and 2')
        return form


def unsupported(text, cause=None):
    """The exception for datagrams that cannot go through a chain."""
    error = SOCKS5Error(text, cause, Reply.COMMAND_NOT_SUPPORTED)
    error.errno = errno.EOPNOTSUPP
    return error


def associate(chain, until, source=()):
    """Conversation: a `FarAssociation` at the last proxy of a chain."""
    form, control, bnd = yield from open_association(chain, 0, until, source)
    if form:
        return FarAssociation(StreamDatagrams(control, UNSPECIFIED, form=form))
    with owned(control):
        family = family_of(bnd.host)
        if not source and control.family == family and not isinstance(control, PlainEnd):
            source = (local_address(control).host,)     # the proxy expects no other
        sock = bound_udp(source_of(family, source))
        with owned(sock):
            sock.connect(bnd.sockaddr)
    return FarAssociation(protected(sock, control), control)


def usable_bnd(bnd, chain, sock, until):
    """Conversation: the address at which the last proxy waits, as it can be reached from here.

    That is `bnd`, from its reply, if is_believable(); else the proxy's own address with the port of
    `bnd`, because many proxies say 0.0.0.0, or an address that is valid in their network only.
    `sock` is connected to the first proxy.
    """
    last = chain[-1]
    if sock.family not in IP_FAMILIES and len(chain) == 1:
        proxy = Address('127.0.0.1', 0)
    else:
        proxy = Address.with_zone(sock.getpeername()) if len(chain) == 1 else Address(last.addr, 0)
    ip = plain_ip(proxy.host.partition('%')[0])
    own = Address(ip if ip and '%' not in proxy.host else proxy.host, bnd.port)
    # With rdns, no name is looked up here: the proxy could learn this host's address by one.
    if last.rdns and ip_bytes(bnd.host) is None:
        return own
    with contextlib.suppress(OSError):  # a name without an address is not believable, either
        for host, port in (yield from resolve(bnd, until)):
            if is_believable(host, ip):
                # Link-local addresses mean nothing without the interface (RFC 4007 section 6).
                zone = proxy.host.partition('%')[2] if host.startswith('fe80:') else ''
                return Address(f'{host}%{zone}' if zone else host, port)
    return own


def is_believable(host, proxy):
    """Whether a proxy may be reached at the IP address `host`, which it names in a reply.

    A proxy on another host must not direct the client to this host or its network, nor a proxy with
    a public address to a private one.  `proxy` is its IP address, None if that is not known.
    """
    if host == proxy:
        return True
    ip = ipaddress.ip_address(host)
    if ip.is_unspecified or ip.is_multicast:
        return False
    if any(map(is_loopback, map(ip_text, with_embedded(ip_bytes(host))))) or is_ours(host):
        return bool(proxy) and (is_loopback(proxy) or is_ours(proxy))
    if is_local(host):
        return bool(proxy) and is_local(proxy)
    return ip.is_global or not (proxy and ipaddress.ip_address(proxy).is_global)


# ----------------------------------------------------------------------------------------- server

LINGER = 2.0                            # seconds, see Stream.linger
PROXY_TIMEOUT = 5.0                     # seconds to read a load balancer's header
IDENT_PORT = 113
IDENT_TIMEOUT = 10.0                    # seconds for the whole query (RFC 1413 suggests more)
ACCEPT_BATCH = 8                        # per event, to leave some for other clients and workers
ACCEPT_PAUSE = 0.1                      # seconds until the next try when there is no room
WARNING_PAUSE = 60.0                    # seconds between two warnings of the same kind
TLS_HANDSHAKE = 0x16                    # first byte of a TLS connection (RFC 8446 section 5.1)
# First bytes that need an option.
OPTION_NEEDED = {6: 'SOCKS6, which needs --socks6', TLS_HANDSHAKE: 'TLS, which needs --tls-cert',
                  0x0D: 'a PROXY header, which needs --proxy-protocol'}
FREE_PORT_TRIES = 10                    # to find a port that is free on several addresses
COSTLY_CALLS = 2                        # at a time, so that others get the processors
DESCRIPTORS_KEPT = 32 + Race.RACERS     # reserved for what no client is counted with
UPSTREAM_ATTEMPTS = 4                   # addresses of one name to ask another proxy for

# First bytes of an HTTP request: those of a token (RFC 9110 section 5.6.2).
HTTP_BYTES = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
                       b'ABCDEFGHIJKLMNOPQRSTUVWXYZ')
HTTP_HELP = """

This port is a proxy for SOCKS4, SOCKS4a, SOCKS5 and HTTP; it has no pages of its own.
Set it in your program as a proxy: http://... or socks5h://..."""
NO_HTTP = """\
This port speaks SOCKS4, SOCKS4a and SOCKS5, not HTTP.
Set it in your program as a SOCKS proxy (socks5h://...), not as an HTTP proxy."""

# Stack options of SOCKS6, of level IP, that are set on the socket of a target: by code, the values
# and the options of ip(7) and ipv6(7), where they are the same.  Happy Eyeballs is always done.
HAPPY_EYEBALLS = 2
STACK_OPTIONS = {
    1: (range(256), socket.IP_TOS, getattr(socket, 'IPV6_TCLASS', None)),
    3: (range(1, 256), socket.IP_TTL, socket.IPV6_UNICAST_HOPS)}
if sys.platform == 'linux':             # IP_MTU_DISCOVER, IPV6_MTU_DISCOVER: no fragmentation
    STACK_OPTIONS[4] = (1, 2), 10, 23
DNS_IN_PROXY = [Address(host, 53) for host in ZEROS]        # for CONNECT of SOCKS6
METHOD_NAMES = {Method.NO_AUTHENTICATION: 'access without authentication',
                Method.GSSAPI: 'GSSAPI', Method.USERNAME_PASSWORD: 'password'}


# Conversions of the fields of `Settings`, from the texts of the command line or other types.  Each
# takes a value, and returns it as `Settings` documents the field, or raises ValueError.

def as_networks(value):
    return Networks(parse_network(str(item)) for item in several(value))


def as_rules(value):
    if value is None:
        return None
    lines = []
    for item in several(value):         # a text may be that of a whole file
        lines += [item] if isinstance(item, Rule) else str(item).split('\n')
    return Rules(line if isinstance(line, Rule) else parse_rule(line, f'rule {number}')
                 for number, line in enumerate(lines, 1)
                 if isinstance(line, Rule) or not re.match(r'\s*(#|$)', line))


def as_hosts(value):
    hosts = tuple(str(item) for item in several(value))
    for host in hosts:
        if ip_bytes(host.partition('%')[0]) is None:
            raise ValueError(f'{host!r}: expected an IP address')
    if len(set(map(family_of, hosts))) < len(hosts):
        raise ValueError('expected at most one IPv4 and one IPv6 address')
    return hosts


def as_users(value):
    if not isinstance(value, Mapping):
        raise ValueError('expected a mapping from names to passwords')
    users = Users(value)
    for name, password in users.items():
        if not isinstance(name, bytes) or not isinstance(password, (bytes, Hashed)):
            raise ValueError('expected names and passwords as text or bytes')
        if len(name) > 255 or isinstance(password, bytes) and len(password) > 255:
            raise ValueError(f'{printable(name_text(name))}: expected at most 255 bytes each')
    return users


def as_chain(value):
    # parse_chain() takes a tuple for one proxy, whose first item is an integer (see `Proxy`).
    if isinstance(value, tuple) and value and not isinstance(value[0], int):
        value = list(value)
    try:
        return tuple(parse_chain(value))
    except TypeError:
        raise ValueError(f'{value!r}: expected a proxy URL, or a sequence of those') from None


def as_ports(value):
    with contextlib.suppress(ValueError, TypeError):
        low, high = value.partition('-')[::2] if isinstance(value, str) else several(value)
        low, high = int(low), int(low if high == '' else high)
        if 0 < low <= high < 65536 or low == high == 0:
            return low, high
    raise ValueError(f'{value!r}: expected (lowest, highest), from 1 to 65535')


def as_port(value):
    port = as_number(int, value)
    if port > 65535:
        raise ValueError(f'{value!r}: expected a port, 1 to 65535, or 0')
    return port


def one_of(expected, is_valid):
    """A conversion that changes nothing, for values of which is_valid(value) is true."""
    def convert(value):
        if not is_valid(value):
            raise ValueError(f'{value!r}: expected {expected}')
        return value
    return convert


as_flag = one_of('True or False', lambda value: isinstance(value, bool))
as_version = one_of('4, 6 or 0, an int', lambda value: value in (0, 4, 6))
# isinstance() would import ssl, which is large, for servers without TLS, too.
as_context = one_of('an ssl.SSLContext of a server', lambda value: value is None or (
    hasattr(value, 'wrap_bio')
    and getattr(getattr(value, 'protocol', None), 'name', '') != 'PROTOCOL_TLS_CLIENT'))


def as_mode(value):
    is_octal = isinstance(value, str) and re.fullmatch('0?[0-7]{3}', value)
    mode = int(value, 8) if is_octal else value
    if mode is None or is_integer(mode) and 0 <= mode <= 0o777:
        return mode
    raise ValueError(f'{value!r}: expected three octal digits, 660 for example')


def as_levels(value):
    levels = several(value)
    if not all(level in (0, 1, 2) and not isinstance(level, bool) for level in levels):
        raise ValueError(f'{value!r}: expected 0, 1 or 2 each, the levels of GssContext')
    return levels


def as_number(kind, value):
    # None and '' stand for 0, which means no limit; 1.5 is no int, though int(1.5) is one.
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = kind(value or 0)
        if 0 <= number < float('inf') and (isinstance(value, str) or number == (value or 0)):
            return number
    raise ValueError(f'{value!r}: expected a number, 0 or more'
                     if kind is float else f'{value!r}: expected a whole number, 0 or more')


def several(value):
    """The items of a setting, as a tuple; a str is one item."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise ValueError(f'{value!r}: expected a str, or a sequence')
    return tuple(value)


# Of fields with these types, the default tells what they are.
CONVERSIONS = {
    name: as_flag if isinstance(default, bool) else functools.partial(as_number, type(default))
    for name, default in Settings()._asdict().items() if isinstance(default, (int, float))}
CONVERSIONS.update(
    users=as_users, clients=as_networks, trusted=as_networks, balancers=as_networks, rules=as_rules,
    upstream=as_chain, tls=as_context, gssapi=as_levels, source=as_hosts, advertise=as_hosts,
    udp_ports=as_ports, udp_port=as_port, unix_mode=as_mode, family=as_version, prefer=as_version,
    max_per_client=lambda value: None if value is None else as_number(int, value))


def prepared(settings):
    """The `Settings` for a server: every field is checked and converted.

    Raises ValueError for a wrong field, OSError if `source` is not an address of this host, or if
    GSSAPI has no keys.
    """
    if not isinstance(settings, Settings):
        raise TypeError(f'settings: expected Settings(users=...), not a {type(settings).__name__}')
    values = {}
    for name, convert in CONVERSIONS.items():
        try:
            values[name] = convert(getattr(settings, name))
        except (ValueError, TypeError, AttributeError, GeneralProxyError) as error:
            raise ValueError(f'Settings.{name}: {error}') from None
    settings = settings._replace(**values)
    for host in settings.source:
        if not is_ours(host):
            raise OSError(errno.EADDRNOTAVAIL,
                          f'cannot connect from {host}: not an address of this host')
    if settings.udp_port and settings.udp_ports[1]:
        raise ValueError('--udp-port, --udp-ports: expected only one of them')
    if settings.udp_port and not hasattr(socket, 'SO_REUSEPORT'):
        raise ValueError('--udp-port: not possible on this system, which has no SO_REUSEPORT')
    if settings.gssapi:
        with gss_library().keys():
            pass
    chains = [settings.upstream, *(rule.via.chain for rule in settings.rules or () if rule.via)]
    if any(proxy.type & TLS for chain in chains for proxy in chain):
        usual_context(*certificate_places())    # loaded now: it takes too long for a loop
    return settings


class LogLine(NamedTuple):
    """What is logged about one client at its end.

    The order of the fields matters: __str__(), Session.line() and `Table` rely on it.
    """
    client: Address
    user: str
    protocol: str
    command: str
    target: str
    outcome: str
    up: int                             # bytes from the client
    down: int                           # bytes from the target
    seconds: float                      # since accept
    target_address: str                 # what the server connected to; not part of the text

    def __str__(self) -> str:
        return '%s %s %s %s %s: %s, %d bytes up, %d down, %.3f s' % self[:-1]

    def entries(self) -> List[Dict[str, Any]]:
        """A list of one dictionary, for `JsonFormatter`."""
        return [dict(self._asdict(), client=str(self.client), seconds=round(self.seconds, 3))]


class Session:
    """One client, from accept() to its log line.

    address           `Address` of the client; a load balancer may have announced it
    peer              `Address` of the other end of the connection, maybe a load balancer's
    key               what counts as one client in limits, see client_key()
    user              name, or '-'
    protocol          'SOCKS4', 'SOCKS5', 'SOCKS6', 'HTTP'; 'TLS' or '-' before their first byte
    command           a `Command`, or None before the request
    target            text of the address in the request, or '-'
    target_address    `Address` that the server connected to; None if it is the same as the target;
                      '' before
    started           time.monotonic() at accept()
    """
    linger = 0                          # see `NoSession`
    __slots__ = ('server', 'address', 'peer', 'key', 'is_counted', 'protocol', 'user', 'command',
                 'target', 'target_address', 'started')

    def __init__(self, server: 'Server', address: Address) -> None:
        self.server = server
        self.address = self.peer = address
        self.key = client_key(address.host)
        self.is_counted = False         # whether `Sessions.connections` counts it
        self.protocol = self.user = self.target = '-'
        self.target_address: Union[Address, str, None] = ''
        self.command: Optional[Command] = None
        self.started = time.monotonic()

    # Asked each time: a reload may change it.
    idle_timeout = property(
        operator.attrgetter('server.settings.idle_timeout'),
        doc='Seconds without traffic after which a tunnel is closed; 0 for no limit.')

    def end(self, outcome: str, up: int = 0, down: int = 0) -> None:
        """Remove the client from the server's sessions, and log its line.

        outcome     text: done, idle, server closed; or the reason after client:, target:, refused:,
                    failed:, no request:
        up, down    bytes from the client, and from the target
        """
        self.server.session_ended(self, up, down)
        self.report(outcome, up, down)

    def report(self, outcome: str, up: int = 0, down: int = 0) -> None:
        """Log the client's line; the connection may go on for a moment, for a reply."""
        # A line costs some microseconds, so it is only made if it is used.
        if self.server.logs_sessions or log.isEnabledFor(logging.INFO):
            self.server.log_session(self.line(outcome, up, down))

    def line(self, outcome: str, up: int, down: int) -> LogLine:
        """The `LogLine` as of now."""
        return make(LogLine, (
            self.address, self.user, self.protocol,
            '-' if self.command is None else self.command._name_,    # .name takes two calls more
            self.target, outcome, up, down, time.monotonic() - self.started,
            self.target if self.target_address is None else str(self.target_address)))


def accept_gssapi(stream, settings):
    """Conversation: establish a GSSAPI context with the client and agree on a level of protection
    (RFC 1961 sections 3 and 4).

    The result is the `GssContext`, with `level` set.  Raises GssError and ProtocolError.
    """
    context, complete = GssContext(), False
    unpack = functools.partial(GssMessage.unpack_token, GssMessage.TOKEN)
    while not complete:
        token = yield from stream.read(unpack)
        if not token:                   # MIT's library would take it for a request for SPNEGO
            raise ProtocolError('an empty GSSAPI token')
        token, complete = yield Call(functools.partial(context.step, token), stream.until)
        if token or complete:
            yield from stream.write(GssMessage(GssMessage.TOKEN, token))
    token = yield from stream.read(functools.partial(GssMessage.unpack_token, GssMessage.LEVEL))
    # NEC's implementation sends the level as one plain byte, not as a wrapped one.
    is_nec = settings.gssapi_nec and len(token) == 1
    wanted = token if is_nec else context.unwrap(token)[0]
    levels = [level for level in settings.gssapi if context.allows(level)]
    if len(wanted) != 1 or not levels:
        raise ProtocolError(f'GSSAPI level {wanted.hex()}, expected one byte'
                            if levels else 'GSSAPI: no level is possible')
    # The server has the last word (RFC 1961 section 4); a client that disagrees leaves.
    context.level = wanted[0] if wanted[0] in levels else max(levels)
    answer = bytes((context.level,))
    yield from stream.write(GssMessage(
        GssMessage.LEVEL, answer if is_nec else context.wrap(answer, False)))
    return context


def ask_ident(client, local, source):
    """Conversation: ask the ident server on the client's host which user owns a connection
    (RFC 1413).

    client, local    `Address` of the connection's two ends
    source           local IP addresses to ask from, as for dial()

    The result is the userid, bytes.  Raises Refused if there is no answer.
    """
    until = deadline(IDENT_TIMEOUT)
    try:
        address = Address(in_zone_of(local.host, client.host), IDENT_PORT)
        with (yield from dial([address], until, source)) as sock:
            stream = Stream(sock, until)
            yield from stream.write(IdentQuery(client.port, local.port))
            userid = (yield from stream.read(IdentReply.unpack)).userid
    except (OSError, EOFError) as error:
        raise Refused(f'ident: {reason(error)}', reply=Reply4.NO_IDENTD) from None
    if userid is None:
        raise Refused("ident: the client's host knows no user", reply=Reply4.NO_IDENTD)
    return userid


CO_GENERATOR = 0x20                     # inspect.CO_GENERATOR; importing inspect takes long
ALWAYS_OFFERED = Command.CONNECT, Command.FORWARD
NOT_SUPPORTED = 'not supported'
COMMAND_METHODS = {command: 'do_' + command.name for command in Command}


def has_same_authorities(context, other):
    """Whether two ssl.SSLContexts of a server accept certificates of the same clients."""
    return context.verify_mode == other.verify_mode and (
        context is other or context.get_ca_certs(True) == other.get_ca_certs(True))


class Handler(socketserver.BaseRequestHandler):
    """Serves one client: negotiates, then does what the client asks for.

    The server constructs Handler(request, client_address, server) for each client, as in
    `socketserver`.  The constructor only stores its arguments; the server's loop then runs
    conversation(), in place of handle().  setup() and finish() are not called.

    Instance variables and methods for subclasses:

    request           the client's socket, non-blocking
    client_address    as accept() returned it
    server            the `Server`
    settings          the server's `Settings`, as of the client's request
    client            the client's `Session`; client.report(outcome) logs its line
    reply(code, address)     conversation: send a `Reply`, with the bound address (BND)
    join(socket, address)    conversation: send the reply Succeeded; the result, to be returned, is
                             a `Tunnel` between the client and `socket`

    Methods that may be overridden:

    do_CONNECT(request), do_BIND(request), do_UDP_ASSOCIATE(request), do_UDP_IN_TCP(request),
    do_RESOLVE(request), do_RESOLVE_PTR(request), do_FORWARD(request), do_NOOP(request)
        do one command.  `request` is a `Request`, `Request4`, `Request6` or `HttpRequest`; it has
        `command` and `address`.  A command without a method is refused as not supported (07).
        FORWARD is an HTTP request other than CONNECT; it connects by do_CONNECT.

    Such a method may be an ordinary function.  It runs in a thread of its own, so it may block and
    sleep.  It returns a connected socket to join the client to; None to close the client's
    connection without a reply; or the result of the method in super(), to do what the server does.
    It refuses by raising `Refused`, with the code in `reply`; any other OSError means that the
    target cannot be reached.

    Or the method is a generator, a conversation.  It runs in the server's loop, so it must not
    block; it yields what it waits for (`Wait`, `Call`, `LookUp`).  It returns a `Tunnel` or a
    `UdpRelay`, or None after it has logged the client's line.  It raises the same errors.
    """
    methods: Dict[int, Tuple[Command, Callable, bool]]
    reached = None                      # `Address` that the balancer's client connected to
    is_authenticated = False
    is_identified = False               # by ident
    tls = None                          # ssl.SSLContext of the connection
    login = None                        # (user name, password) that were right, see `Users`
    # function(code, address) that makes the reply that a refusal has at this point of the
    # negotiation; None as long as the protocol is not known.
    make_reply = None
    stack_options: Mapping[int, int] = MappingProxyType({})     # of SOCKS6: value by code

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.methods = command_methods(cls)

    def __init__(self, request: socket.socket, client_address: Any, server: 'Server') -> None:
        self.request = request
        self.client_address = client_address
        self.server = server
        self.settings = settings = server.settings
        if isinstance(client_address, tuple):
            address = make(Address, client_address[:2])
            if ':' in address.host:     # maybe an IPv4 client of a socket for both families
                address = Address(plain_ip(Address.of(client_address).host), address.port)
        else:
            address = UnixAddress(request.getsockname())
        self.client = client = Session(server, address)
        timeout = settings.handshake_timeout
        self.stream = Stream(request, client.started + timeout if timeout else None)
        self.connection = request       # the socket, or the topmost layer over it
        self.is_verbose = log.isEnabledFor(logging.DEBUG)       # saves most calls of note()

    def note(self, text, *args):
        """Log a step, at level DEBUG."""
        log.debug('%s: ' + text, self.client.address, *args)

    def conversation(self) -> Conversation:
        """Conversation: serve the client.  The result is a relay to go on with, or None."""
        # Until there is a request, an OSError that is no ProxyError comes from the client's socket;
        # from then on, from the way to the target.  So a later step on the client's socket raises
        # EOFError or ClientReset, as `Stream` does.
        relay = request = None
        try:
            yield from self.prepare()
            request = yield from self.negotiate((yield from self.stream.peek()))
            if self.settings is not self.server.settings:
                self.check_again()
            self.server.sessions.negotiated(self.client)
            relay = yield from self.do(request)
        except (EOFError, ClientReset) as error:        # the connection to the client has failed
            self.client_left(error, request)
        except OSError as error:
            if request or isinstance(error, ProxyError):
                yield from self.refuse(error)
            else:
                self.client_left(error, request)
                if self.tls and not is_timeout(error):  # the handshake has failed, with an alert
                    yield from self.stream.linger(deadline(LINGER))
        except Exception:               # the loop logs it, with a traceback
            self.client.report('failed: this is a bug')
            raise
        finally:
            if relay is None:           # else the relay does this at its end
                self.server.session_ended(self.client, 0, 0)
        return relay

    def client_left(self, error, request):
        """Log that the connection to the client has failed, where there is something to say: port
        scans and health checks that send nothing are not logged."""
        if request or self.make_reply or self.client.protocol != '-':
            outcome = 'client' if request else 'no request'
            self.client.report(f'{outcome}: {printable_line(reason(error))}')

    def reply(self, code: int, address: Address = UNSPECIFIED) -> Conversation:
        """Conversation: send a `Reply` in the form of the client's protocol."""
        return self.stream.write(self.make_reply(code, address))

    def refuse(self, error):
        """Conversation: log an error, and send the reply that stands for it."""
        # With a `socket_err` it is not this server that refuses, but the next proxy that fails.
        is_refusal = isinstance(error, ProxyError) and not error.socket_err
        self.outcome = f'{"refused" if is_refusal else "failed"}: {printable_line(reason(error))}'
        self.client.report(self.outcome)
        cause = getattr(error, 'socket_err', None) or error
        if getattr(cause, 'errno', None) in NO_ROOM:    # the administrator has to raise a limit
            self.server.starve(cause)
        address = isinstance(error, Refused) and error.address or UNSPECIFIED
        if self.make_reply:
            with contextlib.suppress(OSError, EOFError):        # the client may have left
                yield from self.reply(reply_for(error), address)
                yield from self.stream.linger(deadline(LINGER))

    # Before the first byte of SOCKS or HTTP

    def prepare(self):
        """Conversation: read a load balancer's header, check the limits, start TLS."""
        settings = self.settings
        if settings.balancers and settings.balancers.has(self.client.peer.host):
            # Exact, because what follows the header may be TLS, which reads the socket itself.
            header = yield from ExactStream(self.request, deadline(PROXY_TIMEOUT)).read(
                ProxyHeader.unpack)
            if header.source:           # the balancer's own health checks have none
                self.take_addresses(header)
        if isinstance(self.client.address, UnixAddress):
            self.client.user = yield Call(functools.partial(account_of, self.request),
                                          self.stream.until)
        # After the header, whose address counts for the limits, and before the handshake of TLS,
        # which costs more than all else here.
        self.server.admit(self.client)
        if settings.tls:
            yield from self.start_tls()

    def take_addresses(self, header):
        """Take the client's address, and the one that it connected to, from a `ProxyHeader`.

        A loopback address is only believed from a balancer on this host: on another, it means the
        balancer's host, and would give the client the rights of a local program here.
        """
        client, source = self.client, canonical(header.source)
        if is_loopback(client.peer.host) or not is_loopback(source.host):
            sessions = self.server.sessions         # which count by key
            task = sessions.negotiated(client)
            client.address, self.reached = source, header.destination
            client.key = client_key(source.host)
            sessions.add(client, task)

    def start_tls(self):
        """Conversation: start TLS.  The common name of a client's certificate is its user name."""
        first = (yield from self.stream.look())[0]
        if first != TLS_HANDSHAKE:      # ssl would wait for more bytes of a SOCKS greeting
            yield from self.stream.peek()       # takes them: unread, they would cause a reset
            raise ProtocolError(f'first byte {first:#04x}, expected TLS')
        self.client.protocol = 'TLS'
        self.tls = self.server.settings.tls or self.settings.tls        # the latest certificate
        tls = TlsLayer(self.request, self.tls, server_side=True)
        yield from tls.handshake(self.stream.until)
        self.stream = Stream(tls, self.stream.until, self.request)
        self.connection = tls
        subject = [pair for part in tls.peer_certificate().get('subject', ()) for pair in part]
        names = [value for name, value in subject if name == 'commonName']
        if len(names) > 1:
            raise ProtocolError(f'a certificate with {len(names)} common names, expected one')
        if subject:
            self.authenticated(*names or [''])

    # Negotiation

    def negotiate(self, first):
        """The conversation that negotiates in the protocol that the first byte tells.

        Its result is a `Request`, `Request4`, `Request6` or `HttpRequest`.
        """
        if first == 4:
            return self.negotiate4()
        if first == 5:
            return self.negotiate5()
        if first in HTTP_BYTES:
            return self.negotiate_http()
        if first == 6 and self.settings.socks6:
            return self.negotiate6()
        found = OPTION_NEEDED.get(first, f'first byte {first:#04x}')
        raise ProtocolError(f'{found}, expected SOCKS or HTTP')

    def negotiate4(self):
        """Conversation: read a request of SOCKS4 or SOCKS4a, and check its userid."""
        self.client.protocol = 'SOCKS4'
        self.make_reply = Response4.of
        request = yield from self.stream.read(Request4.unpack)
        if self.needs_login:
            raise Refused('SOCKS4 has no passwords, expected SOCKS5')
        if self.settings.ident and not isinstance(self.client.address, UnixAddress):
            yield from self.identify(request.userid)
        return request

    def identify(self, userid):
        """Conversation: raise Refused unless the ident server on the client's host has the same
        userid as the request."""
        local = self.reached or local_address(self.request)
        found = yield from ask_ident(self.client.address, local,
                                     () if self.reached else (local.host,))
        user = printable(name_text(found))
        if found != userid or self.is_authenticated and self.client.user != user:
            raise Refused(f'ident: the user is {user}', reply=Reply4.IDENT_MISMATCH)
        self.client.user = user
        self.is_identified = True

    def negotiate5(self):
        """Conversation: agree on a method, authenticate, read the request (RFC 1928)."""
        self.client.protocol = 'SOCKS5'
        self.make_reply = lambda *_: Choice(Method.NO_ACCEPTABLE)
        greeting = yield from self.stream.read(Greeting.unpack)
        method = self.choose(greeting.methods)
        if self.is_verbose:
            self.note('SOCKS5, methods offered: %s, chosen: %02x, %s', greeting.methods.hex(),
                      method, METHOD_NAMES[method])
        yield from self.stream.write(make(Choice, (method,)))
        if method == Method.GSSAPI:
            yield from self.negotiate_gssapi()
        elif method == Method.USERNAME_PASSWORD:
            self.make_reply = lambda *_: Verdict(1)
            yield from self.authenticate((yield from self.stream.read(Credentials.unpack)))
            yield from self.stream.write(Verdict(0))
        self.make_reply = Response
        return (yield from self.stream.read(Request.unpack))

    def choose(self, offered: bytes) -> int:
        """The authentication method to use, of those offered (RFC 1928 section 3).

        Raises Refused without one.  Where no password is needed, a client that offers nothing else
        may send any.
        """
        settings, needs_login = self.server.settings, self.needs_login
        methods = [] if needs_login else [Method.NO_AUTHENTICATION]
        if settings.gssapi:
            methods.append(Method.GSSAPI)
        if settings.users or not needs_login:
            methods.append(Method.USERNAME_PASSWORD)
        for method in methods:
            if method in offered:
                return method
        missing = ' and '.join(f'no {METHOD_NAMES[method]}' for method in methods)
        expected = ' or '.join(f'{method:02x}' for method in methods)
        raise Refused(f'the client offered {missing}; methods offered: {offered.hex() or "none"}, '
                      f'expected {expected}')

    def negotiate6(self):
        """Conversation: read a SOCKS6 request, and authenticate.

        First data stays in the stream, as the next bytes, for the target.
        """
        self.client.protocol = 'SOCKS6'
        self.make_reply = self.refusal6
        request = yield from self.stream.read(Request6.unpack)
        credentials, (methods, size), options = request.credentials(), request.methods(), ()
        if self.is_verbose:
            self.note('SOCKS6, methods offered: %s, options: %s', methods.hex(),
                      ' '.join(str(option.kind) for option in request.options[:99]))
        if credentials:
            self.make_reply = lambda *_: Verdict6(1, (Option.of(Verdict(1)),))
            yield from self.authenticate(credentials)
            options = (Option.of(Verdict(0)),)
        elif self.needs_login:
            yield from self.authenticate_by_method(methods, size)
        yield from self.stream.write(Verdict6(0, options))
        self.make_reply = self.operation_reply
        self.stack_options, self.stack_answers = request.stack_options(), {}
        if request.command == Command.CONNECT and request.address in DNS_IN_PROXY:
            raise Refused(f'CONNECT to {request.address}: there is no DNS server in the proxy',
                          reply=Reply.CONNECTION_REFUSED)
        if request.command == Command.BIND:     # ADDR is where to listen, not the peer
            places = {*ZEROS, *self.own_address()}
            if request.address not in {Address(place, 0) for place in places}:
                raise Refused(f'BIND at {printable(str(request.address))}, expected zeros')
            request = request._replace(address=UNSPECIFIED)
        return request

    def refusal6(self, code, _):
        """The answer to a SOCKS6 request that cannot be parsed.  Its credentials are not known, so
        a wrong type of address is told only where none are needed."""
        if code == Reply.ADDRESS_TYPE_NOT_SUPPORTED and not self.needs_login:
            return Packed(Verdict6(0).pack() + Response6(code).pack())
        return Verdict6(1)

    def authenticate_by_method(self, methods, size):
        """Conversation: have a SOCKS6 client that sent no credentials do so now.

        methods    those that it offers, bytes
        size       bytes of first data that come before the credentials
        """
        method = Method.NO_ACCEPTABLE
        if Method.USERNAME_PASSWORD in methods and self.server.settings.users:
            method = Method.USERNAME_PASSWORD
        choice = Verdict6(1, (Option(Option.METHOD, bytes((method, 0, 0, 0))),) * bool(methods))
        if method == Method.NO_ACCEPTABLE:
            self.make_reply = lambda *_: choice
            raise Refused('no user name and password, expected those of a user')
        yield from self.stream.write(choice)
        self.make_reply = lambda *_: Packed(Verdict(1).pack() + Verdict6(1).pack())
        first, credentials = yield from self.stream.read(
            lambda read: (read(size), Credentials.unpack(read)))
        yield from self.authenticate(credentials)
        self.stream.surplus = first + self.stream.surplus
        yield from self.stream.write(Verdict(0))

    def operation_reply(self, code, address):
        """The SOCKS6 reply for a `Reply`, with the stack options that are set."""
        code = Reply.TIMED_OUT if code == Reply.TTL_EXPIRED else code
        return Response6(code, address, tuple(
            Option(Option.STACK, bytes((0x81, *item, 0))) for item in self.stack_answers.items()))

    def set_stack_options(self, target, is_name):
        """Set the stack options of a SOCKS6 request on the target's socket, where possible.

        is_name    whether the request has a name, so that its addresses were tried by RFC 8305
        """
        if is_name and HAPPY_EYEBALLS in self.stack_options:
            self.stack_answers[HAPPY_EYEBALLS] = 2      # done
        is_ipv6 = target.family == socket.AF_INET6
        level = socket.IPPROTO_IPV6 if is_ipv6 else socket.IPPROTO_IP
        for code, (values, *options) in STACK_OPTIONS.items():
            option, value = options[is_ipv6], self.stack_options.get(code)
            if value in values and option is not None:
                with contextlib.suppress(OSError):
                    target.setsockopt(level, option, value)
                    self.stack_answers[code] = target.getsockopt(level, option) & 0xFF

    def negotiate_gssapi(self):
        """Conversation: authenticate by GSSAPI; what follows is protected as agreed."""
        self.make_reply = lambda *_: GssMessage(GssMessage.ABORT)
        try:
            context = yield from accept_gssapi(self.stream, self.settings)
        except GssError as error:
            raise Refused(error.strerror) from None
        self.authenticated(context.peer)
        if context.level:
            self.connection = GssLayer(self.connection, context, self.stream.surplus)
            self.stream = Stream(self.connection, self.stream.until, self.request)

    def negotiate_http(self):
        """Conversation: read and authenticate the request of an HTTP client."""
        self.client.protocol = 'HTTP'
        if not self.settings.http:
            self.make_reply = lambda *_: HttpAnswer(HttpCode.NOT_IMPLEMENTED, NO_HTTP)
            raise ProtocolError('HTTP, which --no-http switches off, expected SOCKS')
        self.make_reply = functools.partial(self.http_answer, '')
        request = HttpRequest.unpack((yield from self.stream.read_head()))
        self.make_reply = functools.partial(self.http_answer, request.method)
        if self.needs_login:
            yield from self.authenticate_http(request)
        try:
            canonical(request.address)
        except ProtocolError as error:
            raise ProtocolError(error.msg, reply=HttpCode.BAD_REQUEST) from None
        return request

    def http_answer(self, method, code, _):
        """The `HttpAnswer` to a request with `method`, for a reply code.

        After a refusal by rules, or a failure of the network, its text is that of the code: the
        error's own text could disclose internal addresses and names of files.
        """
        if code == Reply.SUCCEEDED:
            return HttpAnswer(HttpCode.OK if method == 'CONNECT' else None)
        status = code if isinstance(code, HttpCode) else HTTP_CODES.get(code, HttpCode.BAD_GATEWAY)
        text = self.outcome if status is code else status.text
        if isinstance(code, Reply) and code != Reply.GENERAL_FAILURE:
            text = code.text
        return HttpAnswer(status, text + HTTP_HELP * (status == HttpCode.BAD_REQUEST),
                          method != 'HEAD')

    def authenticate_http(self, request):
        """Conversation: Basic authentication (RFC 7617), with the users and limits of SOCKS5.

        Raises Refused unless the credentials are right.
        """
        if not self.server.settings.users:
            raise Refused('HTTP has no GSSAPI here, expected SOCKS5', reply=HttpCode.FORBIDDEN)
        make_reply = self.make_reply
        self.make_reply = lambda *_: make_reply(HttpCode.LOGIN_REQUIRED, None)
        credentials = request.credentials
        if not credentials:
            raise Refused('no user name and password, expected Basic')
        yield from self.authenticate(credentials)
        self.make_reply = make_reply

    # Authentication.  It asks the server's settings, not the handler's: a password that a reload
    # has removed must not work for a client that connected before.

    @property
    def needs_login(self):
        """Whether the client has to authenticate, and has not done so."""
        settings = self.server.settings
        return bool(settings.users or settings.gssapi) and not (
            self.is_authenticated or settings.trusted.has(self.client.address.host))

    def authenticated(self, user):
        """The client has authenticated as `user`, by TLS or GSSAPI; the first one counts."""
        if not self.is_authenticated:
            self.client.user = printable(user)
        self.is_authenticated = True

    def authenticate(self, credentials: Credentials) -> Conversation:
        """Conversation: raise Refused unless the credentials are right.

        A failure takes `Settings.login_delay` seconds whatever the reason, which slows down
        guessing, and does not tell whether the user exists.
        """
        if not self.needs_login:
            return
        client, username = self.client, credentials.username
        until = time.monotonic() + self.settings.login_delay
        # The name of a user that does not exist is not logged: it may be a mistyped password.
        name = printable(name_text(username)) if username in self.server.settings.users else '-'
        failures, why = self.server.failures, 'too many wrong passwords'
        if not failures.too_many(client.key, username):
            if (yield from self.verify(credentials)):
                client.user = name
                self.is_authenticated = True
                self.login = username, self.server.settings.users[username]
                return
            why = 'wrong user name or password'
            for user, number in failures.note(client.key, username):
                whose = '' if user is None else f' of {name}'
                log.warning('%s: blocked for %d s after %d wrong passwords%s', client.address.host,
                            failures.WINDOW, number, whose)
        yield Wait((), (), until)
        client.user = name
        raise Refused(why)

    def verify(self, credentials):
        """Conversation: whether the credentials are right, by the users at the end of it."""
        is_hopeless = functools.partial(
            self.server.failures.too_many, self.client.key, credentials.username)
        right = users = None
        while users is not self.server.settings.users:      # a reload came during the hashing
            users = self.server.settings.users
            right = yield from users.verify(credentials, self.stream.until, is_hopeless)
        return right

    def check_again(self):
        """Adopt the settings that were reloaded since the client connected; raise Refused if they
        do not let it in."""
        self.settings = self.server.settings
        if self.login and self.settings.users.get(self.login[0]) != self.login[1]:
            raise Refused('the password has changed')
        if self.needs_login:
            raise Refused('not logged in')
        tls = self.settings.tls
        if tls and not (self.tls and has_same_authorities(self.tls, tls)):
            raise Refused('the certificates have changed')
        served = {'HTTP': self.settings.http, 'SOCKS6': self.settings.socks6}
        if not served.get(self.client.protocol, True):
            raise Refused(f'{self.client.protocol}, expected SOCKS5')
        if self.client.protocol == 'SOCKS4' and self.settings.ident and not self.is_identified:
            raise Refused('ident is required')
        self.server.judge_client(self.client)

    # Commands

    def do(self, request: AnyRequest) -> Conversation:
        """The conversation that does the command of a request."""
        command, method, is_conversation = self.methods.get(request.command, (None, None, None))
        why = self.obstacle(command, isinstance(request, Request4)) if method else NOT_SUPPORTED
        if why:
            name = command.name if command else f'command {request.command:#04x}'
            raise ProtocolError(f'{name} is {why}', reply=Reply.COMMAND_NOT_SUPPORTED)
        self.client.command = command
        address = request.address
        try:
            address = canonical(address)
        except ProtocolError:           # refused in a moment
            pass
        self.client.target = printable(str(address))
        if self.is_verbose:
            self.note('%s %s %s, user %s', self.client.protocol, command.name, self.client.target,
                      self.client.user)
        if is_conversation:
            return method(self, request)
        return self.run_in_thread(functools.partial(method, self, request))

    def run_in_thread(self, function):
        """Conversation: call a do_COMMAND that is an ordinary function, and use its result.

        There is no deadline, but a client that resets its connection ends the conversation; what
        the function returns later is closed.
        """
        result = yield Call(function, None, Worker.OWN)
        if result is None:
            self.client.report('closed')
        elif isinstance(result, socket.socket):
            result.setblocking(False)
            address = UNSPECIFIED
            if result.family in IP_FAMILIES:
                address = Address.of(result.getsockname())
            return (yield from self.join(result, address))
        elif hasattr(result, 'send'):           # a conversation, of super() for example
            return (yield from result)
        else:
            raise TypeError(f'{function.func.__qualname__}() returned a {type(result).__name__}, '
                            f'expected a socket or None')
        return None

    def obstacle(self, command, is_socks4):
        """Why a command is not offered, by the protocol or the settings, as the end of a sentence;
        '' if it is."""
        settings = self.settings
        if command in ALWAYS_OFFERED:
            return ''
        if command == Command.BIND:     # with other proxies, it would leave from here, past them
            return 'not supported through another proxy (-x)' if settings.upstream else ''
        if self.client.protocol == 'SOCKS6':
            return '' if command in (Command.NOOP, Command.UDP_ASSOCIATE) else NOT_SUPPORTED
        if command in (Command.UDP_ASSOCIATE, Command.UDP_IN_TCP) and not is_socks4:
            is_clear = command == Command.UDP_ASSOCIATE and settings.tls
            is_off = is_clear and not settings.udp_over_plain
            return 'not switched on beside TLS (--udp-over-plain)' if is_off else ''
        if command == Command.RESOLVE or command == Command.RESOLVE_PTR and not is_socks4:
            return '' if settings.tor_extensions else 'not switched on (--tor-extensions)'
        return NOT_SUPPORTED

    def do_NOOP(self, request: AnyRequest) -> Conversation:
        """Reply only: a client may just log in, or look whether the proxy is there (SOCKS6)."""
        if request.address not in map(Address, ZEROS, (0, 0)):
            raise ProtocolError('an address for NOOP, expected zeros')
        self.client.target = '-'
        yield from self.reply_with(UNSPECIFIED, 'done')

    def do_CONNECT(self, request: AnyRequest) -> Conversation:
        """Connect to the target, at one of its addresses or by way of other proxies."""
        if not request.address.port:
            raise ProtocolError('port 0, expected 1 to 65535')
        wanted, timeout = request.address, self.settings.connect_timeout
        until = self.stream.until = time.monotonic() + timeout if timeout else None
        ways, addresses = self.server.usual_ways, None
        if self.server.has_ways:
            ways, addresses = yield from self.server.find_ways(self.client, wanted, until)
        for left, way in zip(range(len(ways), 0, -1), ways):
            limit = until and time.monotonic() + (until - time.monotonic()) / left
            source = self.inbound() if way.is_inbound else way.source or self.settings.source
            try:
                if way.chain and way.passes_names and not addresses:
                    found = [self.server.unresolved(self.client, wanted)]
                else:
                    found = addresses or (
                        yield from self.server.destinations(self.client, wanted, limit))
                if way.chain:
                    return (yield from self.connect_through(
                        way.chain, wanted, found, limit, source))
                target = yield from dial(found, limit, source,
                                         self.note if self.is_verbose else None, self.client.key)
                if self.stack_options:
                    self.set_stack_options(target, plain_ip(wanted.host) is None)
                self.client.target_address = None       # the same as what was wanted
                if found[0] != wanted:
                    self.client.target_address = found[0] if len(found) == 1 else (
                        Address.of(target.getpeername()))
                if self.is_verbose:
                    self.note('connected to %s', self.client.target_address or found[0])
                bnd = Address.of(target.getsockname())
                if bnd in found:        # connected to itself, as no program listens on that port
                    target.close()
                    raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
                return (yield from self.join(target, bnd))
            except OSError as error:
                if left == 1 or not self.server.is_unreached(error, way):
                    raise
                if self.is_verbose:
                    self.note('the next way, because: %s', reason(error))

    def inbound(self):
        """The local addresses that the client has connected to, as for dial()."""
        local = self.reached or local_address(self.request)
        return () if isinstance(local, UnixAddress) else (local.host,)

    def do_FORWARD(self, request: 'HttpRequest') -> Conversation:
        """Forward one HTTP request, through a connection as CONNECT makes it.

        The new head goes to the target as if the client had sent it early, after CONNECT;
        `HttpForward` sees to the body and to the response.
        """
        self.client.command = NamedCommand(Command.CONNECT, request.method)
        layer = HttpForward(self.connection, request)
        surplus = layer.take(self.stream.surplus)
        self.stream.surplus = request.forwarded().pack() + surplus
        self.connection = layer
        _, connect, is_conversation = self.methods[Command.CONNECT]
        if is_conversation:
            return (yield from connect(self, request))
        return (yield from self.run_in_thread(functools.partial(connect, self, request)))

    def join(self, target: socket.socket, bnd: Address) -> Conversation:
        """Conversation: send the reply Succeeded with the bound address `bnd`.

        The result is a `Tunnel` between the client and the socket `target`, which owns both.  Bytes
        that the client sent early go to the target first: those that were read with the request;
        what came later is still in the socket.
        """
        try:
            # Urgent data stays in the stream, as with keep_urgent().
            target.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            yield from self.reply(Reply.SUCCEEDED, bnd)
            return Tunnel(self.client, self.connection, target, self.stream.surplus)
        except BaseException:
            target.close()
            raise

    def connect_through(self, chain, address, addresses, until, source):
        """Conversation: CONNECT to an `Address` through other proxies, from the local addresses
        `source`.  The last one is asked for each of `addresses`, until it can reach one."""
        if self.is_verbose:
            self.note('through %s', ', then '.join(map(str, chain)))
        addresses = addresses[:UPSTREAM_ATTEMPTS]
        for wanted in addresses:
            try:
                target, bnd = yield from open_chain(
                    chain, destination(wanted, chain), until, source)
                break
            except (SOCKS5Error, SOCKS4Error, HTTPError) as error:
                # A wrong password stays wrong, and is counted by the other proxy.
                if wanted is addresses[-1] or getattr(error, 'status', None) == 407:
                    raise
        if ip_bytes(wanted.host) is not None:
            self.client.target_address = None if wanted == address else wanted
        if self.is_verbose:
            self.note('the last proxy connects from %s', printable(str(bnd)))
        if plain_ip(bnd.host) is None:  # a name, or a zone; clients expect an IP address as BND
            bnd = UNSPECIFIED
        return (yield from self.join(target, bnd))

    def do_BIND(self, request: AnyRequest) -> Conversation:
        """Accept one connection for the client, from the peer that it named (RFC 1928 section 4).

        The first reply has the address to connect to, the second the peer's.  Other peers are
        closed; if no other came until the timeout, the second reply is "not allowed" with the
        address of the last of them.
        """
        until = self.stream.until = deadline(self.settings.bind_timeout)
        peers = yield from self.server.destinations(self.client, request.address, until)
        expected = [host for host, _ in peers]
        host, advertised = self.own_address(expected)
        with bound(Address(host, 0)) as listener:
            listener.listen(16)         # strangers must not fill the queue before the peer comes
            yield from self.reply(Reply.SUCCEEDED, Address(advertised, listener.getsockname()[1]))
            peer, address = yield from self.accept(listener, expected, request.address.port, until)
        return (yield from self.join(peer, address))

    def accept(self, listener, expected, port, until):
        """Conversation: wait for the expected peer on `listener`, a bound and listening socket.

        The result is its socket and its `Address`.  Raises socket.timeout, or Refused if only other
        peers came.
        """
        stranger = None
        while True:
            try:
                yield from self.stream.wait_for([listener], until)
            except socket.timeout:
                if stranger:
                    raise Refused(f'only {stranger} came', address=stranger) from None
                raise
            try:
                peer, address = listener.accept()
            except (*BLOCKED, ConnectionError):     # it has left again
                continue
            address = Address.of(address)
            if self.is_expected(address.host, port, expected):
                peer.setblocking(False)
                return peer, address
            stranger = address
            peer.close()

    def is_expected(self, host, port, expected):
        """Whether BIND accepts a peer from the IP address `host`, where the client named the IP
        addresses `expected` and the port, which is the one that rules judge.  0.0.0.0 and :: stand
        for any peer that the rules allow."""
        if host in expected or set(expected).isdisjoint(ZEROS):
            return host in expected
        rules = self.server.settings.rules
        rule = None if rules is None else rules.first(self.client, Address(host, port))
        return rules is None or bool(rule and rule.allow)

    def do_UDP_ASSOCIATE(self, request: AnyRequest) -> Conversation:
        """Relay datagrams (RFC 1928 section 7).  The request's address may be the one that the
        client will send from."""
        return (yield from self.associate(self.relay_by_udp(request)))

    def do_UDP_IN_TCP(self, request: AnyRequest) -> Conversation:
        """Relay datagrams that are messages in the client's connection, as hev-socks5-server does;
        so they are inside its TLS or GSSAPI.  The reply repeats the request's address."""
        self.client.command = NamedCommand(Command.UDP_ASSOCIATE, Command.UDP_IN_TCP.name)
        return (yield from self.associate(self.relay_in_tcp(request)))

    def associate(self, begin):
        """Conversation: the relay that the conversation `begin` results in, if the client may have
        an association; raises an OSError if not.

        If all datagrams go by way of other proxies, the association there is opened first, so that
        the client gets to know if they refuse it.
        """
        self.client.target, far = '-', {}
        self.server.judge_association(self.client)
        way, = self.server.usual_ways
        if way.chain and not self.server.has_ways:
            until = self.stream.until = deadline(self.settings.connect_timeout)
            far[way] = yield from self.server.associate(way, until)
        with owned(*far.values()):
            relay = yield from begin
            relay.far, relay.inbound = far, self.inbound()
            return relay

    def relay_in_tcp(self, request):
        """Conversation: the relay for do_UDP_IN_TCP()."""
        is_name = ip_bytes(request.address.host) is None
        yield from self.reply(Reply.SUCCEEDED, UNSPECIFIED if is_name else request.address)
        stream = StreamDatagrams(self.connection, self.client.address, self.stream.surplus)
        return UdpRelay(self.client, stream, stream)

    def relay_by_udp(self, request):
        """Conversation: the relay for do_UDP_ASSOCIATE()."""
        host, settings = self.client.address.host, self.settings
        is_socks6 = isinstance(request, Request6)
        # The shared port does not look at association ids.
        if is_socks6 and (settings.udp_port or settings.tls and not settings.udp_over_plain):
            yield from self.reply(Reply.SUCCEEDED)
            return (yield from self.relay_6())
        own, advertised = self.own_address()
        is_here = is_loopback(host) or is_ours(host)            # it may take every port
        if settings.udp_port:
            near, release = self.server.shared_ports.bind(Address(own, settings.udp_port))
        else:
            near, release = self.server.udp_ports.bind(
                own, settings.udp_ports, None if is_here else client_key(host))
        try:
            yield from self.reply(Reply.SUCCEEDED, Address(advertised, near.getsockname()[1]))
            if is_socks6:
                return (yield from self.relay_6(near, release))
            return UdpRelay(self.client, self.connection, near,
                            self.announced_source(request.address), is_here, release)
        except BaseException:
            near.close()
            release()
            raise

    def relay_6(self, port=None, release=None):
        """Conversation: tell a SOCKS6 client the id of its association; the `Relay6`.

        port, release    the UDP socket for it, if there is one, and the function to call at its end
        """
        association = os.urandom(8)
        yield from self.stream.write(Message6(Message6.BEGUN, association))
        stream = StreamDatagrams(self.connection, self.client.address, self.stream.surplus,
                                 Form6(association))
        return Relay6(self.client, stream, port, release)

    def announced_source(self, address):
        """Where the client will send from, of the `Address` in its request, or UNSPECIFIED.

        Some programs put their target there, and some do not know their address: PySocks sends
        the name "0".
        """
        plausible = ('', '0', '0.0.0.0', '::', self.client.address.host)
        return address if address.port and address.host in plausible else UNSPECIFIED

    def do_RESOLVE(self, request: AnyRequest) -> Conversation:
        """Look up a name (Tor's socks-extensions); IPv4 first, because some clients read no other.
        """
        until = self.stream.until = deadline(self.settings.connect_timeout)
        if (yield from self.asks_upstream(request.address, until)):
            host = yield from self.ask_upstream(request.command, request.address, until)
        else:
            addresses = yield from self.server.destinations(
                self.client, request.address, until, self.server.judge)
            host, _ = min(addresses, key=lambda address: ':' in address.host)
        if ':' in host and isinstance(request, Request4):
            raise ProtocolError(f'{host}: SOCKS4 has no IPv6 addresses')
        yield from self.reply_with(Address(host, 0), f'done, {host}')

    def do_RESOLVE_PTR(self, request: AnyRequest) -> Conversation:
        """Look up the name of an IP address (Tor's socks-extensions)."""
        host = plain_ip(request.address.host)   # the text of one, sent as a name, will do
        if host is None:
            raise ProtocolError('RESOLVE_PTR of a name, expected an IP address',
                                reply=Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        self.server.judge(self.client, Address(host, 0))
        until = self.stream.until = deadline(self.settings.connect_timeout)
        if self.server.is_final:
            name = yield from self.ask_upstream(request.command, Address(host, 0), until)
        else:
            name, _ = yield Call(functools.partial(
                stock(socket.getnameinfo), (host, 0), socket.NI_NAMEREQD), until)
        address = canonical(Address(name, 0))
        yield from self.reply_with(address, f'done, {address.host}')

    def asks_upstream(self, address, until):
        """Conversation: whether the next proxies would be asked for the name by CONNECT, too."""
        if not self.server.is_final or plain_ip(address.host) is not None:
            return False
        ways, _ = yield from self.server.find_ways(self.client, address, until)
        return ways[0] is self.server.usual_ways[0]

    def ask_upstream(self, command, address, until):
        """Conversation: what the next proxies answer to RESOLVE or RESOLVE_PTR, see ask_for()."""
        return ask_for(command, self.settings.upstream, address, until, self.settings.source)

    def reply_with(self, address, outcome):
        """Conversation: send the reply Succeeded, and end the connection."""
        yield from self.reply(Reply.SUCCEEDED, address)
        self.client.report(outcome)
        yield from self.stream.linger(deadline(LINGER))

    def own_address(self, peers=ZEROS):
        """The pair (IP address to bind for BIND or UDP, IP address to send to the client as BND).

        The first is the local address that leads to one of `peers`, IP addresses, or, if they are
        not known, the one that the client connected to.  The second is the same without a zone, or
        the one of Settings.advertise; that may belong to a NAT, which forwards to this host, so it
        is not always one that can be bound.
        """
        host = local_address(self.request).host
        if not set(peers) & set(ZEROS):
            family = family_of(host)    # the client can use this one, so it comes first
            peers = [in_zone_of(host, peer) for peer in peers]
            host = local_ip_towards(
                sorted(peers, key=lambda peer: family_of(peer) != family), self.settings.source)
        for advertised in self.settings.advertise:
            if family_of(advertised) == family_of(host) and not is_loopback(host):
                return (advertised if is_ours(advertised) else host), advertised
        return host, host.partition('%')[0]


def command_methods(handler_class):
    """A dictionary from the number of each command to (`Command`, the method of a handler class
    that does it or None, whether that is a conversation)."""
    methods = {}
    for command, name in COMMAND_METHODS.items():
        method = getattr(handler_class, name, None)
        flags = getattr(getattr(method, '__code__', None), 'co_flags', 0)
        methods[int(command)] = command, method, bool(flags & CO_GENERATOR)
    if not methods[Command.CONNECT][1]:         # which FORWARD connects by
        methods[Command.FORWARD] = Command.FORWARD, None, False
    return methods


Handler.methods = command_methods(Handler)


def processors():
    """The number of processors that this process may use."""
    if hasattr(os, 'sched_getaffinity'):        # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def clients_possible(descriptors):
    """The number of clients, each with that many descriptors, that the limit of open files allows;
    0 for any number."""
    if not resource:                    # Windows, where Python's select() takes 512 sockets
        return (512 - DESCRIPTORS_KEPT) // descriptors
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 0 if soft == resource.RLIM_INFINITY else max(
        4, (soft - DESCRIPTORS_KEPT) // descriptors)


def descriptors_of(chain):
    """The number of descriptors of a client whose target is reached by a chain: two, and two for
    each layer."""
    return 2 + 2 * sum(bool(proxy.type & kind) for proxy in chain for kind in (TLS, GSSAPI))


def listening_addresses(server_address):
    """The list of (host, port) in a `server_address`, which is one pair or a sequence of pairs."""
    pairs = [server_address] if is_pair(server_address) else server_address
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        pairs = [pairs]                 # the error shows it
    for address in pairs:
        if not (is_pair(address) and is_port(address[1])):
            raise ValueError(f"server_address: {address!r}: expected (host, port), for example "
                             f"('127.0.0.1', 1080), or a list of those")
    return [tuple(address[:2]) for address in pairs]


def is_pair(address):
    """Whether this is one (host, port, ...), not a sequence of those."""
    return isinstance(address, (tuple, list)) and len(address) > 1 and isinstance(address[0], str)


def addresses_to_bind(addresses):
    """A list of ([IP address, ...], port) for a list of (host, port); looks names up.

    `::` stands for both families, unless an IPv4 address with the same port is in the list, too.
    Raises ValueError, and OSError if a name is not found.
    """
    found = []
    for host, port in addresses:
        if ip_bytes(host) is not None:
            hosts = [plain_ip(host) or host]
        elif host in ('', '*'):         # some resolvers take these for loopback, some for all
            raise ValueError(f'cannot listen on {host!r}: expected 0.0.0.0 for all IPv4 addresses, '
                             f':: for all of both families')
        else:
            try:
                hosts = [ip for ip, _ in run(resolve(Address(host, 0)))]
            except OSError as error:
                raise OSError(error.errno, f'cannot listen on {host}: {reason(error)}') from None
        found.append((hosts, port))
    ipv4 = {port for hosts, port in found for host in hosts if ':' not in host}
    return [(hosts if port in ipv4 or '::' not in hosts else [*hosts, '0.0.0.0'], port)
            for hosts, port in found]


def bind_all(hosts, port, sockets):
    """Append to `sockets` one for each of the IP addresses `hosts` that this host has; returns the
    port that they are bound to.

    A name may have addresses of other hosts or of a family that is missing here; these are skipped.
    Raises OSError if none is left, or for any other failure; the caller closes the sockets.
    """
    before, missing = len(sockets), None
    for ip in hosts:
        try:
            sockets.append(bound(Address(ip, port)))
            port = sockets[-1].getsockname()[1]         # port 0 is the same free one for all
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            missing = error
    if len(sockets) == before:
        raise missing
    return port


def listening_sockets(addresses, tries=FREE_PORT_TRIES):
    """A list of sockets, bound to a list of (host, port); port 0 is the same free one for all."""
    wanted, sockets, free_port = addresses_to_bind(addresses), [], 0
    try:
        for hosts, port in wanted:
            used = bind_all(hosts, port or free_port, sockets)
            free_port = free_port if port else used
        return sockets
    except OSError as error:
        for sock in sockets:
            sock.close()
        if error.errno != errno.EADDRINUSE or tries == 1 or all(port for _, port in wanted):
            raise
    return listening_sockets(addresses, tries - 1)      # the port was in use on another address


def remove_files(files):
    """Empty `files`, a list of (path, os.stat_result), and remove the files that it names.

    A file that another program has replaced since, for example a new server, is left alone.
    """
    while files:
        path, known = files.pop()
        with contextlib.suppress(OSError):      # it was removed already
            if os.path.samestat(os.stat(path), known):
                os.unlink(path)


def refuse_open_proxy(settings, addresses):
    """Raise ValueError if hosts other than this one could use the proxy without authentication, on
    one of the addresses, a list of `Address`, and the settings do not say that they may."""
    if not (settings.users or settings.gssapi or settings.clients or settings.open
            or settings.tls and settings.tls.verify_mode):      # CERT_NONE is 0
        for address in addresses:
            if not is_loopback(address.host):
                raise ValueError(
                    f'listening on {address} without users would serve everybody; expected users '
                    f'(--users, SOCKS_USERS, -u), networks (--from), or --open to allow it')


class Sessions:
    """The counts of a server's clients.

    associations    number of UDP associations
    connections     dictionary from client_key() to the number of connections, where that is limited
    negotiating     number of clients that have not sent their request yet
    ended, up, down    number of clients that have left; bytes from them and from their targets

    Theory of operation.  `negotiating` is limited.  To make room for one more client, the oldest is
    closed of the key that has most of them, so that one host cannot push out the others.  To find
    that key at once, keys are kept by how many clients they have: `_keys[n]` holds, in the order in
    which they got there, the keys with n clients.  Empty items at the end of `_keys` are removed,
    so the last one has the keys with the most clients.  add() and negotiated() move a key by one
    place.

    add() and negotiated() are called in the thread of the server's loop only, the rest in those of
    all loops.
    """

    def __init__(self):
        self.connections = {}
        self.ended = self.up = self.down = self.associations = 0
        self.negotiating = 0
        self._tasks = {}                # key -> {client: task}, the oldest first
        self._keys = [{}]               # number of tasks -> keys; dictionaries, as ordered sets
        self._lock = threading.Lock()   # for `connections`, `ended`, `up` and `down`

    def add(self, client, task, limit=None):
        """A client begins to negotiate; if there are more than `limit` now, close one of them.

        So any number of clients that send nothing cost `limit` conversations, and none of those
        that do send something waits for them.
        """
        key = client.key
        tasks = self._tasks.setdefault(key, {})
        self._keys[len(tasks)].pop(key, None)
        tasks[client] = task
        self.negotiating += 1
        if len(tasks) == len(self._keys):
            self._keys.append({})
        self._keys[len(tasks)][key] = True
        if limit is not None and self.negotiating > limit:
            key = next(iter(self._keys[-1]))
            next(iter(self._tasks[key].values())).close('dropped to make room (--max-handshakes)')

    def negotiated(self, client):
        """A client has sent its request, or leaves; returns its task, or None if it was not
        negotiating."""
        key, keys = client.key, self._keys
        tasks = self._tasks.get(key, {})
        task = tasks.pop(client, None)
        if task:
            self.negotiating -= 1
            del keys[len(tasks) + 1][key]
            if tasks:
                keys[len(tasks)][key] = True
            else:
                del self._tasks[key]
            while len(keys) > 1 and not keys[-1]:
                keys.pop()
        return task

    def count(self, client, limit):
        """Count a connection of a client; raise Refused if it has `limit` of them already."""
        with self._lock:
            if self.connections.get(client.key, 0) >= limit:
                raise Refused('too many connections from this client (--max-per-client)')
            self.connections[client.key] = self.connections.get(client.key, 0) + 1
            client.is_counted = True

    def remove(self, client, up, down):
        """A client leaves, after so many bytes from it and from its target."""
        if client in self._tasks.get(client.key, ()):
            self.negotiated(client)
        with self._lock:
            self.ended += 1
            self.up += up
            self.down += down
            if client.is_counted:
                self.connections[client.key] -= 1
                if not self.connections[client.key]:
                    del self.connections[client.key]


class BulkLoops:
    """Threads, each with a loop, for tunnels with heavy traffic; at most `size` of them.

    Large reads and writes release the GIL, so they run in parallel, and light tunnels need not wait
    for them.
    """

    def __init__(self, size):
        self._size = size
        self._threads = {}              # loop -> thread
        self.loops = ()                 # replaced, never changed: any thread may walk it
        self.pipes = SystemPipes()

    def take(self, tunnel):
        """Move `tunnel` to a new loop if each has work and there may be one more, else to the loop
        with the fewest items."""
        if len(self._threads) < self._size and all(loop.items for loop in self.loops):
            # Without descriptors or threads for another loop, the tunnel goes on where it can.
            with contextlib.suppress(OSError, RuntimeError):
                self._start()
        if self._threads and tunnel.client and tunnel.loop not in self._threads:
            log.debug('%s: heavy traffic: moved to a bulk thread', tunnel.client.address)
            tunnel.move(min(self.loops, key=lambda loop: len(loop.items)), self.pipes)

    def _start(self):
        loop = Loop()
        thread = threading.Thread(target=loop.run, name='socks-heavy', daemon=True)
        with owned(loop):
            thread.start()
        self._threads[loop] = thread
        self.loops += (loop,)

    def stop(self):
        for loop, thread in self._threads.items():
            loop.stop()
            thread.join()


class Server(socketserver.ThreadingTCPServer):
    """A SOCKS and HTTP proxy on one or several addresses.

    Methods for the caller:

    Server(server_address, settings, handler_class, bind_and_activate=True, listeners=())
        server_address   (host, port), or a list of them.  A name stands for all its addresses, `::`
                         for all addresses of both families, port 0 for a free port, the same for
                         all.  The host `unix:PATH`, with any port, stands for a unix socket; its
                         file is removed by server_close()
        settings         a `Settings`
        handler_class    a subclass of `Handler`; or any other handler of `socketserver`, which gets
                         the plain connection of each client, in a thread of its own
        listeners        listening sockets to use instead of server_address; the server closes them
    start()              serve in a thread of its own; returns the server, for a `with`
    serve_forever()      serve in this thread until shutdown(); may be called again
    shutdown()           have serve_forever() return, from another thread or a signal handler.
                         Clients stay connected, and new ones wait in the listen queue
    server_close(), stop()   stop serving and close everything; also done at the end of a `with`
    drain(seconds)       accept no more clients; serve_forever() returns when the last one has left
    reconfigure(settings)    use other settings from now on

        with Server(('127.0.0.1', 0)).start() as server:
            print(server.server_address)

    Methods that may be overridden.  The server's loops call them, so they must not block:

    verify_request(request, client_address)    whether to serve a client
    authorize(client, target, name=None)       raise `Refused` unless the client, a `Session`, may
                                               reach the target, an `Address` with an IP address
    log_session(line)                          log the `LogLine` of a client; several threads may
                                               call it at once

    process_request(), shutdown_request() and handle_error() are used as in `socketserver`.

    Class variables that may be overridden:

    request_queue_size    length of the listen queues
    heavy_loops           largest number of threads for heavy traffic, 0 for none

    Instance variables:

    server_address    `Address` of the first listener
    addresses         list of the `Address` of each listener
    settings          the `Settings`, checked, with all fields converted
    clients           list of the `Session` of each client that is connected
    RequestHandlerClass    the handler class

    Inherited, but without effect: get_request(), service_actions(), timeout, allow_reuse_address,
    block_on_close.  handle_request() raises NotImplementedError.

    The constructor raises OSError if it cannot listen on an address; ValueError for wrong settings,
    or if the settings would serve everybody on an address beyond loopback.
    """
    server_address: Address
    settings: Settings
    addresses: List[Address]
    request_queue_size = 1024           # the system may lower it (somaxconn, listen(2))
    heavy_loops = min(4, processors())
    _accepting = _draining = False
    _loop_thread = None                 # the number of the thread in serve_forever()

    def __init__(self, server_address: ServerAddress = ('127.0.0.1', 1080),
                 settings: Optional[Settings] = None, handler_class: Type[Handler] = Handler,
                 bind_and_activate: bool = True, listeners: Sequence[socket.socket] = ()) -> None:
        socketserver.BaseServer.__init__(self, listening_addresses(server_address), handler_class)
        self._pool = BlockingPool()
        self.resolver = Resolver(self._pool)
        self.udp_ports = UdpPorts()
        self._configure(prepared(Settings() if settings is None else settings))
        self.listeners = [*listeners]   # sockets
        self.addresses = []
        self._udp_addresses = []        # where Settings.udp_port is that of this server
        self.socket_files = []          # (path, os.stat_result) of those to remove at the end
        self.failures = Failures()
        self.sessions = Sessions()
        self._warned = {}               # time of the last warning, by text
        self._has_conversations = isinstance(handler_class, type) and issubclass(
            handler_class, Handler)
        # An overridden log_session() gets every line, even if the level of the log drops them.
        self.logs_sessions = type(self).log_session is not Server.log_session
        self._thread = None             # that of start()
        # Held in serve_forever().  Reentrant, for shutdown() in a signal handler of that thread.
        self._serving = threading.RLock()
        self._bulk_loops = BulkLoops(self.heavy_loops)
        self._item = LoopItem()         # for the listeners; `due` ends a pause, or a drain
        self._item.ready, self._item.expire = self._accept, self._expire
        self._costly_pool = BlockingPool(COSTLY_CALLS)
        self.loop = Loop(self._pool, self._bulk_loops.take, self.resolver, self._costly_pool)
        self.shared_ports = SharedPorts(self.loop)
        if bind_and_activate:
            try:
                self.server_bind()
                self.server_activate()
            except BaseException:
                self.server_close()
                raise

    def _configure(self, settings):
        """Use `settings`, as prepared() returns them."""
        self.settings = settings
        self.usual_ways = [Way(settings.upstream, settings.source)]
        self.has_ways = bool(settings.rules and settings.rules.have_ways)
        # Names are usually looked up by the last proxy, not here.
        self.is_final = bool(settings.upstream) and settings.upstream[-1].rdns
        chains = [rule.via.chain for rule in settings.rules or () if rule.via]
        # The number of clients that descriptors are left for.
        self.places = clients_possible(max(map(descriptors_of, [settings.upstream, *chains])))
        self.max_clients = settings.max_clients or self.places
        # The default for one host, and for clients without a request, is half of the places, so
        # that others find some; but 64, which one browser may need, if three quarters are as many.
        clients = self.max_clients or 1 << 16
        share = min(max(64, clients // 2), max(2, clients * 3 // 4))
        self.max_handshakes = settings.max_handshakes or share
        self.max_per_client = share     # of other hosts, unless settings.max_per_client is a number
        # With rules on names, a search list must not turn one name into another.
        self.resolver.is_strict = settings.rules is not None
        self.resolver.forget()

    def server_bind(self) -> None:
        """Bind the listeners, and set `addresses`, `server_address` and `socket`."""
        if not self.listeners:
            self.listeners = listening_sockets([
                address for address in self.server_address if not address[0].startswith('unix:')])
            for host, _ in self.server_address:
                if host.startswith('unix:'):
                    path = os.path.abspath(host[5:])
                    self.listeners.append(listening_at(path, self.settings.unix_mode))
                    self.socket_files.append((path, os.stat(path)))
        if not self.listeners:
            raise ValueError('server_address: expected at least one address')
        for sock in self.listeners:
            sock.setblocking(False)
            if sock.family in IP_FAMILIES:
                keep_urgent(sock)       # accepted sockets inherit this
            self.addresses.append(local_address(sock))
        refuse_open_proxy(self.settings, self.addresses)
        self._hold_udp_port(self.settings)
        self.socket = self.listeners[0]
        self.server_address = self.addresses[0]

    def _hold_udp_port(self, settings):
        """Open Settings.udp_port on the addresses of the listeners; OSError if it is in use."""
        port = settings.udp_port
        addresses = {Address(host, port) for host, _ in self.addresses} if port else set()
        self.shared_ports.hold(addresses)
        self._udp_addresses = [*addresses, *(Address(host, port) for host in settings.advertise)]

    def server_activate(self) -> None:
        """Have the listeners listen."""
        for sock, address in zip(self.listeners, self.addresses):
            try:
                sock.listen(self.request_queue_size)
            except OSError as error:    # with SO_REUSEADDR, bind() may allow an address in use
                raise OSError(error.errno, f'cannot listen on {address}: {reason(error)}') from None

    def start(self: Serving) -> Serving:
        """Serve in a thread of its own; returns the server itself, for a `with`."""
        if self.loop.closed or self._thread:
            raise RuntimeError('the server is closed, or started already')
        self._thread = threading.Thread(
            target=self.serve_forever, name='socks-server', daemon=True)
        self._thread.start()
        return self

    def serve_forever(self, poll_interval: Optional[float] = None) -> None:
        """Serve until shutdown(); may be called again.  `poll_interval` has no effect."""
        with self._serving:
            self._loop_thread = threading.get_ident()
            self._watch_listeners(True)
            self.loop.run()
            self._watch_listeners(False)
            self._loop_thread = None

    def shutdown(self) -> None:
        """Have serve_forever() return, and wait until it has, unless it runs in this thread.

        If it is not running, its next call returns at once.
        """
        self.loop.stop()
        with self._serving:
            thread, self._thread = self._thread, None
        if thread and thread is not threading.current_thread():
            thread.join()

    def server_close(self) -> None:
        """Stop serving; close every listener and connection, and end every thread.

        From the server's own loop, this is done in another thread.
        """
        if self._loop_thread == threading.get_ident():
            threading.Thread(target=self.server_close, name='socks-stop').start()
            return
        self.shutdown()
        for sock in self.listeners:
            sock.close()
        remove_files(self.socket_files)
        self._pool.dismiss()
        self._costly_pool.dismiss()
        self._bulk_loops.stop()         # first: a loop must not be closed while it runs
        for loop in self.loops():
            loop.close()
        self.shared_ports.close()
        self._bulk_loops.pipes.close()

    stop = server_close                 # the counterpart of start()

    def handle_request(self) -> None:
        """Not supported: a client is served over many rounds of the loop, not in one call."""
        raise NotImplementedError('expected serve_forever() or start()')

    def drain(self, seconds: float) -> None:
        """Close the listeners, and have serve_forever() return when the last client has left, or
        after `seconds`."""
        self.loop.call(self._item, self._drain, seconds)

    def _drain(self, seconds):
        """drain(), in the thread of the loop."""
        self._watch_listeners(False)
        self._draining = True
        for sock in self.listeners:
            sock.close()
        log.info('draining %s, up to %g s', counted(len(self.clients), 'client'), seconds)
        self.loop.timers.set(self._item, self.loop.now + seconds)
        self._go_on()

    def _go_on(self):
        """A client has left: accept again, or end the drain if it was the last one."""
        if not self._draining:
            self._expire()
        elif not any(loop.items for loop in self.loops()):
            self.loop.stop()

    # Accepting.  The listeners are watched (`_accepting`) except during a pause, in a drain, and
    # outside of serve_forever().  A pause begins when there is no room.  It ends by the timer of
    # `_item`, or as soon as a client leaves: session_ended() has the loop call _go_on().

    def _watch_listeners(self, accepting):
        """Accept clients from now on, or leave them in the listen queues."""
        if accepting != self._accepting:
            self._accepting = accepting
            self._listening = {
                sock.fileno(): (sock, int(sock.family), sock.type & 0xF, sock.proto)
                for sock in self.listeners}
            for sock in self.listeners:
                self.loop.watch(sock, READ * (not accepting), READ * accepting, self._item)

    def _accept(self, fd, _):
        """Accept clients from the listener with the descriptor `fd`, as many as there is room for.
        """
        listener, family, kind, protocol = self._listening[fd]
        room = self._room()
        if room <= 0:
            self._warn('serving %s, more have to wait (--max-clients)',
                       counted(self.max_clients, 'client'))
        for _ in range(min(ACCEPT_BATCH, room)):
            try:
                # As accept() does, which asks the listener for its family each time.
                descriptor, client_address = listener._accept()
                request = _orig_socket(family, kind, protocol, descriptor)
            except BLOCKED:
                return
            except OSError as error:
                if error.errno in NO_ROOM:
                    self.starve(error)
                    return self._pause()
                continue                # accept(2): an error of the new connection, which is gone
            try:
                if self.verify_request(request, client_address):
                    self.process_request(request, client_address)
                else:
                    self.shutdown_request(request)
            except Exception:           # it must not stop the others
                self.handle_error(request, client_address)
                self.shutdown_request(request)
        if self._room() <= 0:
            self._pause()

    def starve(self, error: OSError) -> None:
        """Warn that descriptors or memory are used up."""
        self._warn('cannot accept clients, or cannot serve them: %s', reason(error))

    def _warn(self, text, argument):
        """Log a warning, once a minute at most."""
        now = time.monotonic()
        if now >= self._warned.get(text, float('-inf')) + WARNING_PAUSE:
            self._warned[text] = now
            log.warning(text, argument)

    def _room(self):
        """The number of clients that can be accepted now.

        An association counts as two clients, as it may need four descriptors: the connection, a
        socket for the client, and one for the targets of each family.
        """
        clients = len(self.loop.items)
        for loop in self._bulk_loops.loops:
            clients += len(loop.items)
        room = self.max_clients - clients if self.max_clients else ACCEPT_BATCH
        places = self.places - clients - self.sessions.associations
        return min(room, places) if self.places else room

    def _pause(self):
        """Leave clients in the listen queue until another one leaves, or for ACCEPT_PAUSE, as other
        parts of the process may release descriptors, too."""
        self._watch_listeners(False)
        self.loop.timers.set(self._item, self.loop.now + ACCEPT_PAUSE)

    def _expire(self):
        """A pause is over: accept again.  Or the time of a drain is: stop."""
        self.loop.timers.set(self._item, None)
        if self._draining:
            self.loop.stop()
        else:
            self._watch_listeners(True)

    # One client

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a `Handler`'s conversation in the loop, or another handler's thread."""
        if not self._has_conversations:
            request.setblocking(True)
            return super().process_request(request, client_address)
        request.setblocking(False)
        handler = self.RequestHandlerClass(request, client_address, self)
        task = Task(handler.client, request, handler.conversation())
        self.sessions.add(handler.client, task, self.max_handshakes)
        try:
            task.start(self.loop)
        except Exception:
            self.loop.failed(task)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the exception that is being handled, with its traceback."""
        log.exception('%s: this is a bug', client_address)

    def admit(self, client: Session) -> None:
        """Raise Refused unless `client` may use the server at all: by its network, and by the
        number of its connections, which are counted from here on."""
        settings = self.settings
        if settings.clients:
            self.judge_client(client)
        limit = settings.max_per_client
        if limit is None and not is_loopback(client.address.host):
            limit = self.max_per_client
        if limit:
            self.sessions.count(client, limit)

    def judge_client(self, client: Session) -> None:
        """Raise Refused unless `client` is in one of the networks to serve (Settings.clients)."""
        clients = self.settings.clients
        if clients and not clients.has(client.address.host):
            raise Refused('the client is in none of the networks to serve (--from)')

    def authorize(self, client: Session, target: Address, name: Optional[str] = None) -> None:
        """Raise Refused unless a client may reach a target.

        client    a `Session`
        target    an `Address` with an IP address; called for each one of a name
        name      the name that the client asked for, or None

        A client with a loopback address may reach anything that the rules allow.  Other clients
        never reach the proxy itself.  They reach LOCAL_NETWORKS, or BIND for any peer (a target of
        zeros), only by a rule on such a network.
        """
        rule = None if self.settings.rules is None else self.judge(client, target, name)
        if target.host in ZEROS and client.command != Command.BIND:     # taken for loopback
            raise Refused(f'{target.host} is not a host address', reply=Reply.GENERAL_FAILURE)
        if is_loopback(client.address.host):
            return
        if is_local(target.host) and not (rule and rule.opens(target.host)):
            raise Refused(f'{target.host} is local to the proxy')
        listeners = self.addresses
        if self._udp_addresses and client.command == Command.UDP_ASSOCIATE:
            listeners = listeners + self._udp_addresses
        # A client that reaches the proxy through itself appears as one on this host.  The second
        # test, which asks the system, is only for listeners with the same port.
        if any(target.port == port for _, port in listeners):
            hosts = list(map(ip_text, with_embedded(ip_bytes(target.host))))
            for host, port in listeners:
                if port == target.port and (
                        host.partition('%')[0] in hosts
                        or host in ZEROS and any(map(is_ours, hosts))):
                    raise Refused(f'{target} is the proxy itself')

    def judge(self, client: Session, target: Address, name: Optional[str] = None) -> Optional[Rule]:
        """The `Rule` that allows a target, as in authorize(), or None if there are no rules; raises
        Refused if none does."""
        rules = self.settings.rules
        if rules is None:
            return None
        rule = allowing(rules.first(client, target, name), target)
        if rule.via and rule.via != Way() and client.command not in WAY_COMMANDS:
            raise Refused(f'{rule.place} chooses a way, which is for connections and UDP only')
        return rule

    def permitted(self, client: Session, address: Address) -> Address:
        """The canonical form of an `Address`; raises Refused if no rule can allow it by its name.

        It comes before the look-up, so that a forbidden name does not reach a name server.
        """
        address, settings = canonical(address), self.settings
        if settings.rules is not None and ip_bytes(address.host) is None:
            allowing(settings.rules.first_for_name(client, address, self.is_final), address)
        return address

    def unresolved(self, client: Session, address: Address) -> Address:
        """The `Address` to ask the last proxy for if that one looks names up; raises Refused.

        A name of that proxy's own host, such as localhost, must be allowed as the loopback
        addresses that it stands for there.
        """
        host, port = target = self.permitted(client, address)
        if ip_bytes(host) is not None:
            self.authorize(client, target)
        elif LOOPBACK_NAME.match(host):
            for each in ('127.0.0.1', '::1'):
                self.authorize(client, Address(each, port), host)
        return absolute(address)

    def destinations(self, client: Session, address: Address, until: Optional[float],
                     judge: Optional[Callable] = None) -> Conversation:
        """Conversation: look an `Address` up; the result is a list of the `Address`es of it that
        the client may reach, at least one.

        judge    function(client, address, name) that raises Refused for one that the client may
                 not reach; by default authorize()

        Raises socket.gaierror, or Refused if none is allowed.
        """
        allowed, refusal, wanted = [], None, self.permitted(client, address)
        name = wanted.host if ip_bytes(wanted.host) is None else None
        judge, found, settings = judge or self.authorize, [wanted], self.settings
        if name:
            found = yield from resolve(address, until)
        if settings.family or settings.prefer:
            found = usable(found, settings)
        if name and log.isEnabledFor(logging.DEBUG):
            log.debug('%s: %s is %s', client.address, name, ', '.join(host for host, _ in found))
        # Each address is judged, not the name alone: its owner may point it at the proxy's network
        # (DNS rebinding).  Connections go to exactly the addresses that are returned.
        for candidate in found:
            try:
                judge(client, candidate, name)
            except Refused as error:
                refusal = error
                if log.isEnabledFor(logging.DEBUG):
                    log.debug('%s: not allowed: %s', client.address, reason(error))
            else:
                allowed.append(candidate)
        if not allowed:
            raise refusal
        return allowed

    def judge_association(self, client: Session) -> None:
        """Raise Refused if no rule can allow a datagram of `client`, OSError if there are not
        enough descriptors for an association."""
        rules = self.settings.rules
        if rules is not None and not rules.may_allow(client, Command.UDP_ASSOCIATE):
            raise Refused('no rule allows datagrams of this client')
        served = sum(len(loop.items) for loop in self.loops())
        if self.places and served + self.sessions.associations >= self.places:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    # Ways

    def ways(self, client: Session, target: Address, name: Optional[str] = None) -> List[Way]:
        """The `Way`s to an IP address in canonical form, asked for by `name` or not, in the order
        in which to try them."""
        if not self.has_ways:
            return self.usual_ways
        ways = self.settings.rules.ways(client, target, name)
        return self._with_usual(ways or [None])         # without any, authorize() says why

    def _with_usual(self, ways):
        """The ways with that of the settings in the place of None."""
        return [way or self.usual_ways[0] for way in ways]

    def find_ways(self, client: Session, address: Address,
                  until: Optional[float]) -> Conversation:
        """Conversation: the `Way`s to an `Address`, and, if these depend on it, its destinations().

        The result is (list of ways, None) if the name or IP address asked for decides, or if the
        name has no address here; else (ways of the first destination, list of the destinations that
        have the same ways).
        """
        wanted = self.permitted(client, address)
        if not self.has_ways or ip_bytes(wanted.host) is not None:
            return self.ways(client, wanted), None
        rules = self.settings.rules
        ways = self._with_usual(rules.ways_by_name(client, wanted, self.is_final))
        if ways:
            return ways, None
        try:
            found = yield from self.destinations(client, address, until)
        except socket.gaierror as error:
            ways = self._with_usual(rules.ways_by_name(client, wanted, self.is_final, filter))
            if error.errno not in NO_SUCH_NAME or not (ways and ways[0].passes_names):
                raise
            return ways, None
        each = [self.ways(client, one, wanted.host) for one in found]
        return each[0], [one for one, ways in zip(found, each) if ways == each[0]]

    @staticmethod
    def is_unreached(error: OSError, way: Way) -> bool:
        """Whether an error means that a way is not there, rather than the target behind it."""
        if isinstance(error, ProxyConnectionError):
            return True
        if len(way.chain) > 1:          # one proxy of a chain did not reach the next one
            return (getattr(error, 'proxy', None) not in (None, way.chain[-1].without_secrets())
                    and error.reply in ERROR_RANKS)
        return bool(way.source) and error.errno == errno.EADDRNOTAVAIL

    def associate(self, way: Way, until: Optional[float]) -> Conversation:
        """Conversation: a `FarAssociation` at the last proxy of a `Way`."""
        return associate(way.chain, until, way.source or self.settings.source)

    def log_session(self, line: LogLine) -> None:
        """Log the line of a client, at its end."""
        # Like log.info(), without a search for the caller.  Session.report() looks at the level.
        if not self.logs_sessions or log.isEnabledFor(logging.INFO):
            log.handle(log.makeRecord(log.name, logging.INFO, 'socks.py', 0, line, (), None,
                                      'log_session'))

    def session_ended(self, client: Session, up: int, down: int) -> None:
        """Remove a client, after `up` bytes from it and `down` from its target; in the thread of
        any loop."""
        self.sessions.remove(client, up, down)
        if not self._accepting:
            self.loop.call(self._item, self._go_on)

    # All clients

    def reconfigure(self, settings: Settings) -> None:
        """Use other settings from now on.

        Tunnels go on; the datagrams of associations are judged by the new rules.  Raises the same
        errors as the constructor; the old settings stay then.
        """
        settings = prepared(settings)
        refuse_open_proxy(settings, self.addresses)
        self._hold_udp_port(settings)
        self._configure(settings)
        for loop in self.loops():
            for item in list(loop.items):
                if isinstance(item, UdpRelay):
                    loop.call(item, item.routes.forget)

    @property
    def clients(self) -> List[Session]:
        """A list of the `Session` of each client that is connected."""
        # list() copies at once, as other threads add and remove items.  A client is there twice
        # while a relay takes the place of a task, and None where a relay is just ending.
        clients = [item.client for loop in self.loops() for item in list(loop.items)]
        return [client for client in dict.fromkeys(clients) if client]

    def loops(self) -> List[Loop]:
        """A list of the loops that serve clients."""
        return [self.loop, *self._bulk_loops.loops]


# ------------------------------------------------------------------------------------ socket face
#
# The client as socket objects: the interface of PySocks 1.7.1, and additions in its style.  Without
# a proxy, such a socket behaves as a stock one in every respect.

PROXY_TYPE_SOCKS4, PROXY_TYPE_SOCKS5, PROXY_TYPE_HTTP = SOCKS4, SOCKS5, HTTP
PRINTABLE_PROXY_TYPES = {number: TYPE_NAMES[number] for number in (SOCKS4, SOCKS5, HTTP)}
PROXY_TYPES = {name: number for number, name in PRINTABLE_PROXY_TYPES.items()}
NO_PROXY = (None,) * 6
# (type, protocol) of the IPv4 and IPv6 sockets that a proxy can serve.
TCP_KINDS = {(socket.SOCK_STREAM, proto) for proto in (0, socket.IPPROTO_TCP, 262)}     # 262: MPTCP
UDP_KINDS = {(socket.SOCK_DGRAM, proto) for proto in (0, socket.IPPROTO_UDP)}
# Families that may reach other networks; others stay on this host, or on one bus or link.
WIDE_FAMILIES = {getattr(socket, name) for name in ('AF_INET', 'AF_INET6', 'AF_PACKET')
                 if hasattr(socket, name)}
MSG_DONTWAIT = getattr(socket, 'MSG_DONTWAIT', 0)       # not on Windows
MSG_FASTOPEN = 0x20000000 if sys.platform == 'linux' else 0
SO_ACCEPTCONN = getattr(socket, 'SO_ACCEPTCONN', 2)     # Windows has it, its socket module does not
NEEDS_SELECTORS = "UDP through a proxy needs asyncio's SelectorEventLoop"
MAX_SKIPPED = 64                        # datagrams that a non-blocking recvfrom() skips at once
MAX_RECEIVERS = 1024                    # ports for which a socket remembers the host it sent to
# The defaults of a stock socket's family, type and proto, which ask the descriptor since 3.7.
STOCK = (-1,) * 3 if sys.version_info >= (3, 7) else (socket.AF_INET, socket.SOCK_STREAM, 0)

if ContextVar is None:                  # Python 3.6: one value per thread, not per task
    class ContextVar(threading.local):
        def __init__(self, name, default=None):
            self.value = default

        def get(self):
            return self.value

        def set(self, value):
            before, self.value = self.value, value
            return before

        reset = set

_scope = ContextVar('socks_default_proxy', default=None)       # what _default() returns, or None


def proxy_tuple(proxy_type, addr=None, port=None, rdns=True, username=None, password=None):
    """The 6-tuple that set_proxy() keeps, as PySocks' programs read it.

    It is a `Proxy`; or for no proxy, a tuple whose first field is None; or for a chain, the fields
    of the first proxy, but with the list of all in place of the type.

    proxy_type may be a URL, or a list of URLs and of such tuples; then the rest is not used.
    """
    if proxy_type is None:
        return None, addr, port, rdns, encoded(username), encoded(password)
    if not isinstance(proxy_type, (str, list)):
        return Proxy.checked(proxy_type, addr, port, rdns, username, password)
    chain = parse_chain(proxy_type)
    if not chain:
        return NO_PROXY
    first = chain[0]
    return first if len(chain) == 1 else (chain, first.addr, first.port, first.rdns, None, None)


def check_bypass(bypass):
    """Raise ValueError unless `bypass` is text, or None."""
    if not isinstance(bypass or '', str):
        raise ValueError(f'bypass: expected hosts in one str, not {type(bypass).__name__}')


def set_default_proxy(proxy_type: ProxyType = None, addr: Union[str, bytes, None] = None,
                      port: Optional[int] = None, rdns: bool = True, username: Secret = None,
                      password: Secret = None, *, bypass: str = '') -> None:
    """Set the proxy for all socksockets created from now on, unless their set_proxy() is called.

    The arguments are those of socksocket.set_proxy().  `bypass` lists hosts that are reached
    without the proxy, in the format of is_bypassed(): 'localhost, 127.0.0.0/8, .local'.

    With a proxy, modules that connect without using `socket` (PAST_SOCKET) are logged as a warning,
    since a program may then set socket.socket to socksocket.
    """
    check_bypass(bypass)
    socksocket.default_proxy = proxy_tuple(proxy_type, addr, port, rdns, username, password)
    socksocket.default_bypass = bypass
    if socksocket.default_proxy[0] is not None:
        ImportGuard.install()
    elif socket.socket is _orig_socket:
        ImportGuard.remove()


def setdefaultproxy(*args: Any, **kwargs: Any) -> None:
    """Alias of set_default_proxy() that also accepts `proxytype` for `proxy_type`."""
    if 'proxytype' in kwargs:
        kwargs['proxy_type'] = kwargs.pop('proxytype')
    return set_default_proxy(*args, **kwargs)


@contextlib.contextmanager
def default_proxy(proxy: ProxyArgument, bypass: str = '') -> Iterator[None]:
    """Context manager: another default proxy, for this thread or task only.

    proxy   URL, list of URLs for a chain, tuple of set_proxy()'s arguments, or None for no proxy
    bypass  as in set_default_proxy()
    """
    check_bypass(bypass)
    token = _scope.set((proxy_tuple(parse_chain(proxy)), bypass))
    try:
        yield
    finally:
        _scope.reset(token)


def _default(socket_class=None):
    """(default proxy, bypass) for a class of sockets; the proxy is a 6-tuple or None.

    In this order: default_proxy() around the call, set_default_proxy(), default_proxy() around
    wrap_module().  Programs may set the class attribute, too, as PySocks' do.
    """
    socket_class = socket_class or socksocket
    return (_scope.get() or not socket_class.default_proxy and _wrapped_with
            or (socket_class.default_proxy, socket_class.default_bypass))


def get_default_proxy() -> Optional[ProxyTuple]:
    """The default proxy, a 6-tuple, or None if none was ever set."""
    return _default()[0]


getdefaultproxy = get_default_proxy
_wrapped_with = None                    # what _default() returned within default_proxy(), or None


def check_module(module):
    """Raise ValueError if `module` neither is `socket` nor has imported it."""
    if module is not socket and getattr(module, 'socket', None) is not socket:
        raise ValueError(f'{module!r}: expected socket, or a module that has imported it')


def wrap_module(module: Any, dns: bool = False) -> None:
    """Replace socket.socket by socksocket, for the whole process, not only for `module`.

    module  `socket`, or a module that has imported it
    dns     whether to replace the resolver's functions, too, so that names are not looked up on
            this host but left to the proxy, see getaddrinfo()

    Within default_proxy(), its proxy becomes that of all threads without a default proxy, for
    example those of asyncio.

    Importing a module that connects without using `socket` (PAST_SOCKET) is logged as a warning;
    with `dns` it fails.

    Raises GeneralProxyError if there is no default proxy, or if with `dns` such a module has been
    imported before; ValueError if `module` has not imported `socket`.
    """
    global _wrapped_with
    if not get_default_proxy():
        raise GeneralProxyError('No default proxy specified')
    check_module(module)
    if dns:
        ImportGuard.refuse_imported()
    _wrapped_with = _scope.get() or _wrapped_with
    socket.socket = socksocket
    if dns:
        for function in RESOLVER:
            setattr(socket, function.__name__, function)
        virtual_addresses.is_on = True
    ImportGuard.install()
    if sys.platform == 'win32':
        from asyncio.windows_events import IocpProactor
        wrap_proactor(IocpProactor)


def unwrap_module(module: Any) -> None:
    """Undo wrap_module(), for the whole process.

    Raises ValueError if `module` neither is `socket` nor has imported it.
    """
    global _wrapped_with
    check_module(module)
    _wrapped_with = None
    socket.socket = _orig_socket
    for function in RESOLVER:
        if getattr(socket, function.__name__) is function:
            setattr(socket, function.__name__, function.stock)
    virtual_addresses.is_on = False
    virtual_addresses.forget_origins()
    ImportGuard.remove()


wrapmodule, unwrapmodule = wrap_module, unwrap_module

# Modules that bypass the proxy: they have sockets or a resolver of their own, or start interpreters
# in this process, which import a `socket` that is not wrapped.
PAST_SOCKET = {'_xxsubinterpreters', 'concurrent.interpreters', 'curl_cffi', 'eventlet', 'gevent',
               'grpc', 'pycares', 'pycurl', 'uvloop', 'winloop'}


class ImportGuard:
    """A finder for sys.meta_path that warns of the modules of PAST_SOCKET, or refuses them."""
    TEXT = 'connections of the module %s bypass the proxy'
    # Refused too, but without a warning: concurrent.futures imports it, to see whether it exists.
    INTERPRETERS = '_interpreters'

    @classmethod
    def install(cls):
        """Begin to watch, and warn of what has been imported before."""
        if cls not in sys.meta_path:
            sys.meta_path.insert(0, cls)
            for name in cls.imported():
                log.warning(cls.TEXT, name)

    @classmethod
    def remove(cls):
        if cls in sys.meta_path:
            sys.meta_path.remove(cls)

    @staticmethod
    def imported():
        """A list of the modules of PAST_SOCKET that have been imported."""
        return [name for name in sorted(PAST_SOCKET) if sys.modules.get(name)]  # None: forbidden

    @classmethod
    def refuse_imported(cls):
        """Raise GeneralProxyError if a module of PAST_SOCKET has been imported."""
        for name in cls.imported():
            raise GeneralProxyError(f'{cls.TEXT % name}, and it has been imported already')
        sys.modules.pop(cls.INTERPRETERS, None)         # so that an import asks find_spec()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        # An import of `socket` makes a fresh copy, which is not wrapped.
        if name in PAST_SOCKET or name in ('socket', cls.INTERPRETERS):
            if virtual_addresses.is_on:
                raise ModuleNotFoundError(f'refused: {cls.TEXT % name}', name=name)
            if name != cls.INTERPRETERS:
                log.warning(cls.TEXT, name)


def host_text(host):
    """A caller's host, of a type that the stock functions take, as str; '' for any other type."""
    if isinstance(host, (bytes, bytearray)):
        return name_text(host)
    return host if isinstance(host, str) else ''


def restore_name(dest_pair):
    """A caller's (host, port, ...), with a virtual address replaced by the name it stands for."""
    name = None
    if isinstance(dest_pair, (tuple, list)) and dest_pair:
        name = virtual_addresses.name(host_text(dest_pair[0]))
    return dest_pair if name is None else (name, *dest_pair[1:])


def is_looked_up(host):
    """Whether this host's resolver may see the host: the default proxy does not resolve it."""
    default, bypass = _default()
    chain = parse_chain(default)
    return not chain or not chain[-1].rdns or is_bypassed(host, bypass)


def screen_host(host):
    """(host, name) of a look-up: either `host` for the stock resolver and None, or None and a name
    that the stock resolver must not see, because the proxy resolves it.

    Raises socket.gaierror if `host` is no valid name.
    """
    text = host_text(host)
    if text in ('', '<broadcast>') or ip_bytes(text.partition('%')[0]) or is_looked_up(text):
        return host, None
    with contextlib.suppress(ProtocolError):
        # canonical() turns the old forms of IPv4 addresses (127.1) into the usual one.
        ip = canonical(Address(text, 0)).host
        return (ip, None) if ip_bytes(ip) else (None, text)
    try:
        name_to_send(text)
    except ProtocolError as error:
        raise socket.gaierror(socket.EAI_NONAME, f'{printable(text)}: {error}') from None
    return None, text


def remember(host, found):
    """Remember the IP addresses found for a name that `bypass` lists.

    A program then connects to such an address, and `bypass` must exempt it, too.  The result is
    None; or the name, if one of the addresses may stand for another name, too: then the program
    must get a virtual address instead.
    """
    text = host_text(host)
    if not text or ip_bytes(text) or not is_bypassed(text, _default()[1]):
        return None
    for ip in found:
        virtual_addresses.remember(ip, text)
    return text if any(virtual_addresses.number(ip) is not None for ip in found) else None


def resolver(function):
    """Decorator of a function that wrap_module() may put in place of the one in `socket`, which it
    has as the attribute `stock`."""
    function.stock = getattr(socket, function.__name__)
    return function


# These ask no name server for a name, unless the host is exempt from the proxy, or the default
# proxy does not resolve names (socks5, socks4).  The stock getfqdn() and create_connection()
# look these functions up in `socket`, so they need no replacement.

@resolver
def getaddrinfo(host: Union[str, bytes, None], port: Union[str, bytes, int, None], family: int = 0,
                type: int = 0, proto: int = 0,
                flags: int = 0) -> List[Tuple[Any, Any, int, str, Any]]:
    """socket.getaddrinfo(), except for names that the default proxy resolves: they get an address
    of `VirtualAddresses`, which connect() and sendto() turn into the name again."""
    original = getaddrinfo.stock
    host, name = screen_host(host) if not flags & socket.AI_NUMERICHOST else (host, None)
    if name is None:
        found = original(host, port, family, type, proto, flags)
        name = remember(host, [info[4][0] for info in found])
    if name is None:
        return found
    kept = flags & (socket.AI_PASSIVE | socket.AI_CANONNAME | getattr(socket, 'AI_NUMERICSERV', 0))
    found = original(virtual_addresses.of(name, family), port, family or socket.AF_INET, type,
                     proto, kept | socket.AI_NUMERICHOST)
    if flags & socket.AI_CANONNAME:
        found[0] = (*found[0][:3], name, found[0][4])
    return found


@resolver
def gethostbyname(host):
    """socket.gethostbyname(), with the exception of getaddrinfo()."""
    stand_in, name = screen_host(host)
    if name is None:
        found = gethostbyname.stock(stand_in)
        name = remember(host, [found])
    return found if name is None else virtual_addresses.of(name)


@resolver
def gethostbyname_ex(host):
    """socket.gethostbyname_ex(), with the exception of getaddrinfo()."""
    stand_in, name = screen_host(host)
    if name is None:
        found = gethostbyname_ex.stock(stand_in)
        name = remember(host, found[2])
    return found if name is None else (name, [], [virtual_addresses.of(name)])


def name_of(ip):
    """The name for which getaddrinfo() gave an IP address; else None if the stock resolver may be
    asked for it, '' if not."""
    with contextlib.suppress(GeneralProxyError):
        name = virtual_addresses.name(ip)
        return name or virtual_addresses.origin(ip) or (None if is_looked_up(ip) else '')
    return ''


@resolver
def gethostbyaddr(ip_address):
    """socket.gethostbyaddr(), but only addresses that getaddrinfo() gave have names."""
    text = host_text(ip_address)
    if not ip_bytes(text):
        host, name = screen_host(ip_address)
        return (gethostbyaddr.stock(host) if name is None
                else (name, [], [virtual_addresses.of(name)]))
    name = name_of(text)
    if name == '':
        raise socket.herror(1, 'Unknown host')
    return gethostbyaddr.stock(ip_address) if name is None else (name, [], [text])


@resolver
def getnameinfo(sockaddr, flags):
    """socket.getnameinfo(), but only addresses that getaddrinfo() gave have names."""
    original = getnameinfo.stock
    host, service = original(sockaddr, flags & ~socket.NI_NAMEREQD | socket.NI_NUMERICHOST)
    name = '' if flags & socket.NI_NUMERICHOST else name_of(host)
    if name is None:
        return original(sockaddr, flags)
    if not name and flags & socket.NI_NAMEREQD:
        raise socket.gaierror(socket.EAI_NONAME, f'{host} has no name')
    return name or host, service


RESOLVER = (getaddrinfo, gethostbyname, gethostbyname_ex, gethostbyaddr, getnameinfo)

_listeners = set()                      # weak references to listening socksockets
_proxied = weakref.WeakValueDictionary()        # by descriptor: the last socksocket with a proxy


def check_own_name(sockaddr):
    """Raise OSError if a program binds to a name that must not be looked up, see getaddrinfo().

    The name of this host itself may be, whatever the domain.
    """
    host = host_text(sockaddr[0]) if isinstance(sockaddr, (tuple, list)) and sockaddr else ''
    if (not virtual_addresses.is_on or host in ('', '<broadcast>', 'localhost')
            or ip_bytes(host.partition('%')[0]) or is_looked_up(host)):
        return
    if host.lower().partition('.')[0] != socket.gethostname().lower().partition('.')[0]:
        raise OSError(errno.EADDRNOTAVAIL, f'{printable(host)}: not looked up, expected an IP '
                                           f'address or the name of this host')


def is_exempt(dest_pair, bypass, is_default=True):
    """Whether (host, port, ...) is reached without the proxy: the patterns `bypass` match its host,
    or the name for which getaddrinfo() found it; or, for a default proxy, listens_here()."""
    if not isinstance(dest_pair, (tuple, list)) or len(dest_pair) < 2:
        return False
    host = host_text(restore_name(dest_pair)[0]) if bypass else ''
    return any(is_bypassed(known, bypass, dest_pair[1])
               for known in (host, virtual_addresses.origin(host)) if known) or (
        is_default and listens_here(dest_pair))


def listens_here(dest_pair):
    """Whether (host, port, ...) is that of a socksocket of this process listening on loopback.

    Programs connect to themselves, and servers in tests to each other; a default proxy on another
    host could not reach them.
    """
    if not _listeners:
        return False
    host, port = host_text(restore_name(dest_pair)[0]), dest_pair[1]
    ip, name = plain_ip(host), host.lower().rstrip('.')
    if not (is_loopback(ip) if ip else ('.' + name).endswith('.localhost')):
        return False
    for listener in [reference() for reference in list(_listeners)]:
        with contextlib.suppress(OSError):      # closed
            sockaddr = _orig_socket.getsockname(listener) if listener is not None else ('', -1)
            bound_ip = plain_ip(sockaddr[0].partition('%')[0])
            if sockaddr[1] == port and (bound_ip in ('0.0.0.0', '::', ip)
                                        or not ip and is_loopback(bound_ip)):
                return True
    return False


def set_self_blocking(function: Function) -> Function:
    """Decorator of a socket's method: make it block, even if the socket is non-blocking."""
    @functools.wraps(function)
    def blocking(self, *args, **kwargs):
        timeout = self.gettimeout()
        if timeout == 0:
            self.setblocking(True)
        try:
            return function(self, *args, **kwargs)
        finally:
            if timeout == 0:
                self.setblocking(False)
    return blocking


def relayed(method: Function) -> Function:
    """Decorator of a method for datagrams that go through a relay; else the stock one is called."""
    stock = getattr(_orig_socket, method.__name__, None)
    names = method.__code__.co_varnames[:method.__code__.co_argcount]
    defaults = dict(zip(reversed(names), reversed(method.__defaults__ or ())))

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        if self._is_datagram and self._ensure_relay():
            return method(self, *args, **kwargs)
        if kwargs:                      # PySocks' methods take keywords, most stock ones do not
            given = {**defaults, **kwargs}
            rest = list(itertools.takewhile(given.__contains__, names[1 + len(args):]))
            args = (*args, *[given[name] for name in rest])
            kwargs = {name: kwargs[name] for name in kwargs if name not in rest}
        return stock(self, *args, **kwargs)
    del wrapper.__wrapped__             # parameters of the stock methods have no names
    return wrapper


class _Descriptor(_orig_socket):
    """The part of `socksocket` that is about its descriptor.

    Theory of operation.  A program makes a socket of one family and may give its number to a
    selector before connect().  The connection may then need another one: a proxy of another family
    or on a unix socket, the next address after a failure, or the `PlainEnd` of a layer.  So the new
    descriptor is put in place of the old one, under its number.
    """

    def _check_open(self):
        if self.fileno() < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    @contextlib.contextmanager
    def _stock_copy(self):
        """Context manager: a non-blocking stock socket for the same connection.

        Conversations use it, because subclasses may override any method.
        """
        timeout = self.gettimeout()
        self._check_open()
        # A duplicate, because another thread may close this socket, and its number be reused.
        with _orig_socket(self.family, self.type, self.proto, socket.dup(self.fileno())) as sock:
            sock.setblocking(False)
            try:
                yield sock
            finally:                    # duplicates share O_NONBLOCK
                super().settimeout(timeout)

    def _replace(self, sock, stays_same=False):
        """Take over the descriptor of `sock`, under the number of this one except on Windows.

        stays_same  whether family, type and proto stay those of this socket

        If this one has been closed, by another thread perhaps, `sock` is closed, too.
        """
        like = self if stays_same else sock
        timeout, family, kind, proto = self.gettimeout(), like.family, like.type, like.proto
        fd = super().detach()
        if fd < 0:
            abort(sock)                 # the background loop drops the layer of a `PlainEnd`
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        other = sock.detach()
        if os.name == 'posix':          # dup2() closes the old descriptor in the same step
            os.dup2(other, fd, os.get_inheritable(fd))
            os.close(other)
        else:
            os.set_handle_inheritable(other, os.get_handle_inheritable(fd))
            socket.close(fd)
            fd = other
        _orig_socket.__init__(self, family, kind, proto, fd)
        self.settimeout(timeout)


class Association:
    """The relay at a proxy for the datagrams of a `socksocket` (RFC 1928 section 7).

    control   its TCP connection; the association ends with it
    relay     address of the relay, if the socket is not connected to it
    is_other  whether the socket's descriptor is not of the family and type that the socket has

    Theory of operation.  If all datagrams go through the relay, the socket is connected to it, so
    that the system drops those of other hosts.  With a bypass, other hosts are sent to directly:
    then it is not connected, and the source of a datagram tells which way it came.
    """
    in_tcp = False                      # whether the socket's descriptor is that of `control`
    is_shut_down = False                # the program has called shutdown()

    def __init__(self, control, relay=None, is_other=False):
        self.control = control
        self.relay = relay
        self.is_other = is_other
        self._context = getattr(control, 'context', None)   # `GssContext` for datagrams, or None
        self._peeked = None, b''        # the message that MSG_PEEK has left, and its content
        self._has_ended = False         # _end() was called
        self._sockets = set()           # ids of those that have this association

    def watched(self, sock):
        """The sockets that become readable with a datagram, or the end of the association."""
        return [sock] if self.in_tcp else [sock, self.control]

    def check(self):
        """Raise GeneralProxyError if the proxy has ended the association."""
        if not self.in_tcp:
            with contextlib.suppress(*BLOCKED), self._failing():
                self._has_ended = not self.control.recv(4096)
        if self._has_ended:
            raise self._end()

    @contextlib.contextmanager
    def _failing(self):
        """Context manager: an error, of the connection or in a message, ends the association."""
        try:
            yield
        except BLOCKED:
            raise
        except OSError as error:
            raise self._end(error) from None

    def _end(self, error=None):
        """The exception to raise from now on."""
        self._has_ended = True
        return GeneralProxyError('The proxy ended the UDP association', error)

    def connect(self, sock):
        """Have the system drop the datagrams that do not come from the relay."""
        if self.relay:
            _orig_socket.connect(sock, self.relay)
            self.relay = None

    def send(self, sock, address, data, flags):
        """Send `data` to `address`; the number of its bytes sent."""
        header = udp_header(address)
        datagram = b''.join((header, data))
        size = len(datagram) - len(header)
        if self._context:
            datagram = self._context.seal(datagram)
        if self.relay:
            sent = _orig_socket.sendto(sock, datagram, flags, self.relay)
        else:
            sent = _orig_socket.send(sock, datagram, flags)
        return size if self._context else max(0, sent - len(header))

    def receive(self, sock, flags):
        """(payload, sender) of the next datagram.

        The sender is an `Address`; a plain tuple if the datagram came directly; None if the socket
        is shut down.  Raises EOFError or ProtocolError for a datagram to be skipped: one that is
        malformed, or a fragment.
        """
        data, source = _orig_socket.recvfrom(sock, 1 << 16, flags)
        if not source or self.relay and Address.of(source) != Address.of(self.relay):
            return data, source
        if self._context:
            data = self._unwrap(data, flags & socket.MSG_PEEK)
        datagram = Datagram.unpack(data)
        if datagram.fragment:
            raise ProtocolError('a fragment')
        return datagram.payload, datagram.address

    def _unwrap(self, message, stays):
        """The data that a datagram protects by GSSAPI (RFC 1961 section 5).

        stays   whether it was only peeked at: the library would call it a replay the next time
        """
        data = (self._peeked[1] if message == self._peeked[0]
                else self._context.unseal(message))
        self._peeked = (message, data) if stays else (None, b'')
        return data

    def join(self, sock):
        """Serve `sock`: the first one, or a duplicate of it."""
        self._sockets.add(id(sock))
        return self

    def leave(self, sock):
        """Called by each of the sockets when it is closed; the last one ends the association."""
        self._sockets.discard(id(sock))
        if not self._sockets:
            self.control.close()


class StreamAssociation(Association):
    """An association whose datagrams are messages of a `form` in the TCP connection (UDP_IN_TCP).

    Theory of operation.  The descriptor of the `socksocket` is that of the connection, so that it
    is readable when a datagram has come.  Therefore no byte is read beyond the message that is
    returned, which is peeked at first; but the part of a message that has come is read.  A
    datagram that the connection takes in part cannot be unmade: the background loop sends the
    rest, and no other datagram is taken before that.
    """
    LARGEST = 65507                     # bytes in a UDP datagram over IPv4
    MESSAGE = 3 + 0xFF + 0xFFFF         # bytes in the longest message
    in_tcp = True

    def __init__(self, control, form):
        super().__init__(control, is_other=True)
        self._form = form
        self._stream = ExactStream(control, None)
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._unsent = b''              # the rest of a message that was sent in part

    def send(self, sock, address, data, flags):
        header, size = udp_header(address), memoryview(data).nbytes
        if size > self.LARGEST:
            raise OSError(errno.EMSGSIZE, f'{size} bytes, expected at most {self.LARGEST}')
        message = message_of(self._form, b''.join((header, data)))
        until = deadline(sock.gettimeout())
        while True:
            try:
                self._send_message(message)
                return size
            except BLOCKED:
                if sock.gettimeout() == 0 or flags & MSG_DONTWAIT:
                    raise
            if not poll((), [self.control], until):
                raise socket.timeout('timed out')

    def _send_message(self, message):
        """Send all of a message, or raise BlockingIOError."""
        with self._writing:
            self._flush()
            with self._failing():
                self._unsent = message[self.control.send(message, MSG_DONTWAIT):]
            if self._unsent:
                loop, sock, session = background_loop(), self.control.dup(), NoSession()
                session.is_sending = True
                rest = Task(session, sock, self._send_rest(sock))
                loop.call(rest, rest.start, loop)

    def _send_rest(self, sock):
        """Conversation: send the rest of a message; `sock` is a duplicate to wait for."""
        with contextlib.suppress(GeneralProxyError):        # receive() raises it, too
            while self._unsent:
                yield from wait_ready((), [sock], None)
                with self._writing, contextlib.suppress(*BLOCKED):
                    self._flush()

    def _flush(self):
        with self._failing():
            while self._unsent:
                self._unsent = self._unsent[self.control.send(self._unsent, MSG_DONTWAIT):]

    def receive(self, sock, flags):
        try:
            with self._reading, self._failing():
                seen = self.control.recv(self.MESSAGE, socket.MSG_PEEK | MSG_DONTWAIT)
                data = seen and self._stream.take(self._form.unpack, seen,
                                                  flags & socket.MSG_PEEK).datagram
            if not seen and (self._has_ended or not self.is_shut_down):
                raise self._end()
        except EOFError:
            raise BlockingIOError(errno.EAGAIN, 'a part of a message') from None
        except GeneralProxyError:
            # The end of a connection stays readable, and would keep an event loop busy.
            sock._replace(_orig_socket(socket.AF_INET, socket.SOCK_DGRAM), True)
            self.control.close()
            raise
        if not seen:
            return b'', None
        datagram = Datagram.unpack(data)        # there is none in an error of SOCKS6, for example
        return datagram.payload, datagram.address

    def leave(self, sock):
        if self._unsent and self._sockets == {id(sock)}:        # ends _send_rest()
            with contextlib.suppress(OSError):
                self.control.shutdown(socket.SHUT_RDWR)
        super().leave(sock)


SEND_BUFFER = socket.SOL_SOCKET, socket.SO_SNDBUF


class Attempt:
    """A connect() through proxies that does not block.

    error     the exception that has ended it, or None
    is_done   whether it is connected

    Theory of operation.  A socket is writable as soon as TCP is connected to the proxy, but
    connect() is done only after further messages, and only a thread can exchange these while the
    program waits in select().  So the program's socket, `near`, is connected to this process
    (`far`) instead, and its send buffer is filled: it is not writable then.  The background loop,
    which also drives layers, connects `inner` to the destination.  Then it takes the filling out of
    `far`, and a `Tunnel` joins the two; after a failure, it resets `far`.  Either makes `near`
    writable, for select(), poll() and epoll, even if its descriptor was registered before.  What
    the program sends too early follows the filling.

    Linux calls a socket writable if a third of its send buffer is free.  What may still leave the
    buffer after it was full is one window of `far`, so that must be less than a third.  The size of
    the buffer is the program's again when it is connected.

    Other processes, or duplicates, may have the program's socket too.  So its options are theirs,
    and it ends the attempt only when the last descriptor is closed.
    """
    WINDOW, BUFFER = 1 << 13, 1 << 16   # bytes; Linux doubles both

    def __init__(self, sock, near, inner, conversation):
        """Begin: `conversation` connects `inner`, a socksocket, for `sock`, which `near` is a stock
        copy of."""
        self._sock, self._filling, self.error, self.is_done = weakref.ref(sock), 0, None, False
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.BUFFER)
        # Else flush_at_exit() could miss what Nagle's algorithm holds back.
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _, self._far = tcp_pair(near, self.WINDOW)
        with owned(self._far), contextlib.suppress(*BLOCKED):
            self._descriptors = select.epoll()          # knows those of the program's socket
            self._descriptors.register(near, 0)
            while True:
                self._filling += near.send(bytes(self.BUFFER))
        self._session, self._loop = NoSession(), background_loop()
        self._task = Task(self._session, self._far, self._run(inner, conversation))
        self._loop.call(self._task, self._task.start, self._loop)

    def _run(self, inner, conversation):
        """Conversation: the tunnel between `far` and `inner`, or None."""
        try:
            with owned(inner):
                yield from conversation
                self._session.is_sending = self.is_done = True
                self._tell_socket(inner)
                yield from self._take_filling()
                self._far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
                keep_urgent(inner)
                end = _orig_socket(inner.family, inner.type, inner.proto, inner.detach())
                return Tunnel(NoSession(), self._far, end)
        except BaseException as error:  # ClientReset, too: the program has closed its socket
            self.error, self.is_done = error, False
            self._far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)    # for its close()
            if not isinstance(error, (OSError, EOFError, ClientReset, GeneratorExit)):
                raise
        finally:
            self._descriptors.close()

    def _tell_socket(self, inner):
        """Give the program's socket what it has as a connected one."""
        sock = self._sock()
        if sock:
            sock.proxy_sockname, sock._proxy_address = inner.proxy_sockname, inner._proxy_address
            option = sock._options.get(SEND_BUFFER)
            with contextlib.suppress(Exception):        # it is closed, or the value is a wrong one
                _orig_socket.setsockopt(sock, *option)

    def _take_filling(self):
        """Conversation: read the filling from `far`, so that `near` becomes writable."""
        while self._filling:
            try:
                self._filling -= len(self._far.recv(self._filling))
            except BLOCKED:
                yield from wait_ready([self._far], (), None)

    def end_if_closed(self):
        """End the attempt if no descriptor of the program's socket is left in any process."""
        if self.is_done or self._loop.closed:           # closed: this is the child of a fork
            return
        # An epoll object drops a socket with its last descriptor, epoll(7); proc(5) lists the rest.
        with contextlib.suppress(OSError, ValueError):
            with open(f'/proc/self/fdinfo/{self._descriptors.fileno()}') as info:
                if 'tfd:' not in info.read():
                    self._loop.call(self._task, self._task.close, 'closed by the program')

    def check(self):
        """Raise an OSError unless it is connected."""
        if self.error:
            raise self.error if isinstance(self.error, OSError) else OSError(
                self.code, str(self.error))
        if not self.is_done:
            raise BlockingIOError(errno.EALREADY, os.strerror(errno.EALREADY))

    @property
    def code(self):
        """SO_ERROR: the errno if it has failed, 0 while it is under way and after a success."""
        if not self.error:
            return 0
        cause = getattr(self.error, 'socket_err', self.error)
        if is_timeout(cause):
            return errno.ETIMEDOUT
        return (getattr(self.error, 'errno', None)
                or REPLY_ERRNOS.get(reply_for(cause), errno.ECONNABORTED))


class socksocket(_Descriptor):
    """A socket that connects through a proxy; a stock socket if it has none.

    The first arguments are those of socket.socket.  `proxy` is a URL; a list of URLs, which is a
    chain, the nearest proxy first; empty for no proxy; or None for the default proxy.

    Proxies carry TCP and UDP over IPv4 and IPv6.  Sockets that reach no other network are always
    stock ones; those of all other kinds raise OSError if they have a proxy.

    UDP begins with bind(), connect() or the first datagram.  If datagrams are inside TCP, see
    open_association(), the descriptor is that of the connection from then on, so a selector must
    get it afterwards; and hosts that are exempt from the proxy cannot be sent to.

    connect() blocks even if the socket is non-blocking, for SETUP_TIMEOUT seconds at most, since
    programs for PySocks rely on that.  If it fails, the socket is closed.  With `connect_blocks`
    false, it raises BlockingIOError and goes on in the background, as that of a stock socket does:
    when it is done, the socket is writable, and getsockopt() tells SO_ERROR.  This is for Linux;
    the connection takes more CPU time, since all data pass through a thread of this process.

    Methods for the caller, besides those of a socket:

    - set_proxy(proxy_type, addr, port, rdns, username, password)
    - get_proxy_sockname() -> (host, port)
    - get_proxy_peername() -> address

    Instance variables:

    - proxy                 6-tuple, see set_proxy()
    - proxy_peername        (host, port) given to connect(), None without a proxy
    - proxy_sockname        (host, port) that the proxy says it connects from
    - ssl_context           for proxies inside TLS; None for the usual one
    - connect_blocks        whether connect() blocks in any case; also a class variable
    - connect_error         the exception why a connect() in the background has failed, or None

    Class variables, for all sockets created afterwards:

    - default_proxy         6-tuple or None, see set_default_proxy()
    - default_bypass        hosts reached without it
    - default_source        local IP addresses to connect from, one per family
    """
    default_proxy: Optional[ProxyTuple] = None
    default_bypass = ''
    default_source: Tuple[str, ...] = ()
    connect_blocks = True
    proxy: ProxyTuple

    def __init__(self, family: int = STOCK[0], type: int = STOCK[1], proto: int = STOCK[2],
                 fileno: Optional[int] = None, *, proxy: ProxyArgument = None) -> None:
        default, bypass = _default(self.__class__) if proxy is None else (
            proxy_tuple(parse_chain(proxy)), '')
        super().__init__(family, type, proto, fileno)
        kind = self.type & 0xF, self.proto      # Python 3.6 has flags in `type`
        if self.family in (socket.AF_INET, socket.AF_INET6):
            self._is_datagram = kind in UDP_KINDS
            self._is_proxiable = self._is_datagram or kind in TCP_KINDS
        if self._is_datagram:
            self._associating = threading.Lock()
            self._receivers = {}        # by port: the host given to sendto(), None for several
        self._is_local = self.family not in WIDE_FAMILIES
        self.proxy, self._is_default, self._bypass = default or NO_PROXY, proxy is None, bypass
        if fileno is not None and self._twin():         # ssl does so, and then detaches that one
            self._copy_state(self._twin())
        if self.proxy[0]:
            _proxied[self.fileno()] = self

    proxy_peername: Optional[Tuple[Any, ...]] = None
    proxy_sockname: Optional[Tuple[Any, ...]] = None
    ssl_context: Optional['ssl.SSLContext'] = None
    _is_datagram = False                # whether it is UDP over IPv4 or IPv6
    _is_proxiable = False               # whether it is TCP or UDP, over IPv4 or IPv6
    _is_local = True                    # whether its family reaches no other network
    _is_default = False                 # whether `proxy` is the default one
    _goes_directly = False              # whether connect() has found that it needs no proxy
    _bypass = ''                        # patterns of hosts to reach without the proxy
    _association = None                 # `Association` for datagrams
    _gives_names_back = False           # whether a sender can be a name, see _sender()
    _parsed = None, []                  # cache: a value of `proxy`, and its chain
    _options: Dict[Any, Any] = {}       # arguments of setsockopt(), for _renew()
    _local = None                       # address given to bind(), for _renew()
    _proxy_address = None               # of the first proxy, as the system has it
    _attempt = None                     # `Attempt` that connect() has begun, until it is done
    _is_accepted = False                # whether accept() has returned it
    # What sockets for the same connection have in common.
    _shared: Tuple[str, ...] = (
        'proxy', '_is_default', '_bypass', 'ssl_context', 'proxy_peername', 'proxy_sockname',
        '_proxy_address', '_association', '_attempt', '_options', '_local', '_is_accepted')

    def _twin(self):
        """Another socksocket with a proxy that has the same descriptor, or None."""
        twin = _proxied.get(self.fileno())
        return twin if twin is not self and twin and twin.fileno() == self.fileno() else None

    def _copy_state(self, other):
        """Copy what another socket for the same connection knows about it."""
        for name in self._shared:
            setattr(self, name, getattr(other, name))

    def set_proxy(self, proxy_type: ProxyType = None, addr: Union[str, bytes, None] = None,
                  port: Optional[int] = None, rdns: bool = True, username: Secret = None,
                  password: Secret = None, *, optimistic: bool = False) -> None:
        """Set the proxy for the next connect(); without arguments, use none.

        proxy_type          SOCKS4, SOCKS5 or HTTP; or a URL, or a list of URLs for a chain, with
                            which the other arguments are not used
        addr, port          of the proxy; the default port is 1080, for HTTP 8080
        rdns                whether the proxy resolves names
        username, password  str or bytes; SOCKS4 has only a user name
        optimistic          whether to send all messages to a proxy at once, see `Flight`

        Raises GeneralProxyError for an invalid type, ValueError for any other argument.
        """
        self.proxy = proxy_tuple(proxy_type, addr, port, rdns, username, password)
        if optimistic:
            self.proxy = proxy_tuple(parse_chain(self.proxy, OPTIMISTIC))
        self._is_default, self._bypass = False, ''
        _proxied[self.fileno()] = self

    def setproxy(self, *args: Any, **kwargs: Any) -> None:
        """Alias of set_proxy() that also accepts `proxytype` for `proxy_type`."""
        if 'proxytype' in kwargs:
            kwargs['proxy_type'] = kwargs.pop('proxytype')
        return self.set_proxy(*args, **kwargs)

    def _chain(self, dest_pair=None):
        """The chain to use for `dest_pair`, empty to act as a stock socket.

        Raises OSError if this is a kind of socket that no proxy carries: it must not send past it.
        """
        if self._is_local or not self.proxy[0] or is_exempt(
                dest_pair, self._bypass, self._is_default and not self._is_datagram):
            return []
        if not self._is_proxiable:
            raise OSError(errno.EOPNOTSUPP, 'only TCP and UDP go through a proxy, not sockets of '
                                            f'type {self.type & 15}, protocol {self.proto}')
        return self._proxies()

    def _proxies(self):
        """The chain of `proxy`, parsed again if a program has set that attribute itself."""
        if self._parsed[0] is not self.proxy:
            self._parsed = self.proxy, parse_chain(tuple(self.proxy))
        return self._parsed[1]

    def _sockaddr(self, address):
        """`address` for a system call: a virtual address is replaced by a real one of its name."""
        pair = restore_name(address)
        if pair is address:
            return address
        return _orig_getaddrinfo(*pair[:2], self.family, self.type & 15)[0][4]

    def _go_directly(self, dest_pair):
        """Prepare to connect without the proxy; the address for the system's connect()."""
        self._goes_directly = True
        if self._association:
            if self._association.is_other:
                self._replace(_orig_socket(self.family, socket.SOCK_DGRAM))
            self._association.leave(self)
            self._association = self.proxy_peername = None
        self._bind_source(dest_pair)
        pair = restore_name(dest_pair)
        if pair is dest_pair or self._is_datagram:
            return self._sockaddr(dest_pair)
        # Take an address of another family, if the name has none of this socket's.
        family, *_, sockaddr = min(look_up(*pair[:2]), key=lambda info: info[0] != self.family)
        if family != self.family:
            self._renew(family)
        return sockaddr

    def setsockopt(self, *args: Any) -> None:
        """As in stock, but options of TCP, UDP and IP are ignored if the proxy is on a unix socket,
        or datagrams are inside TCP; those of IPv6, if connect() has made this a socket of IPv4."""
        if self._attempt and args[:2] == SEND_BUFFER:
            self._options = {**self._options, SEND_BUFFER: args}
            if not self._attempt.is_done:       # which sets the option when it is
                return
        if not self._ignores(args[0]):
            super().setsockopt(*args)
        if self._is_proxiable and not self.proxy_peername:
            self._options = {**self._options, args[:2]: args}

    @overload
    def getsockopt(self, level: int, optname: int) -> int: ...

    @overload
    def getsockopt(self, level: int, optname: int, buflen: int) -> bytes: ...

    def getsockopt(self, *args: Any) -> Any:
        """As in stock, but an option that setsockopt() ignores is 0, or b''."""
        if args and self._ignores(args[0]):
            return b'' if len(args) > 2 else 0
        if args == (socket.SOL_SOCKET, socket.SO_ERROR) and self._attempt:
            error = super().getsockopt(*args)   # takes that of `near`, which has another one
            return self._attempt.code or error
        if args == (socket.SOL_SOCKET, socket.SO_TYPE) and self._is_proxiable:
            # SSLSocket asks for this and then takes the descriptor, which must be connected by now,
            # unless wrap_module() came before ssl: then SSLSocket is a socksocket itself.
            if not issubclass(getattr(sys.modules.get('ssl'), 'SSLSocket', object), socksocket):
                self._guard_descriptor()
            if self._association:       # the descriptor may be that of a TCP connection
                return self.type & 0xF
        return super().getsockopt(*args)

    def _ignores(self, level):
        return (self._is_proxiable and level != socket.SOL_SOCKET
                and (self.family not in IP_FAMILIES
                     or self._association and self._association.in_tcp
                     or level == socket.IPPROTO_IPV6 and self.family == socket.AF_INET
                     and self.proxy_peername))

    def bind(self, *address: Any) -> None:
        """As in stock; a UDP socket with a proxy requests its relay now."""
        if address and self.family in IP_FAMILIES:
            check_own_name(restore_name(address[0]))
        elif address:
            self._chain(address[0])     # raises: a bound packet socket can send past the proxy
        address = tuple(map(self._sockaddr, address))
        super().bind(*address)
        self._local = address[0]
        if self._is_datagram:
            self._ensure_relay()

    def listen(self, *backlog: int) -> None:
        super().listen(*backlog)
        if not self._is_local:
            _listeners.add(weakref.ref(self, _listeners.discard))

    def accept(self) -> Tuple[socket.socket, Any]:
        sock, address = super().accept()
        if isinstance(sock, socksocket):        # after wrap_module()
            sock._is_accepted = True
        return sock, address

    def _guard_descriptor(self):
        """Raise GeneralProxyError if whoever takes the descriptor could connect past the proxy."""
        if (self.fileno() < 0 or self._is_local or not self.proxy[0] or self.proxy_peername
                or self._association or self._goes_directly or self._is_connected()):
            return
        if not super().getsockopt(socket.SOL_SOCKET, SO_ACCEPTCONN):
            raise GeneralProxyError('Connect first: whatever takes the descriptor of this socket '
                                    'would bypass the proxy')

    def detach(self) -> int:
        if not self._twin():
            self._guard_descriptor()
        return super().detach()

    def connect(self, dest_pair: Any, catch_errors: Optional[bool] = None) -> None:
        """Connect to `dest_pair`, (host, port), through the proxy, if there is one.

        Raises ProxyConnectionError if the proxy cannot be reached; SOCKS5AuthError, SOCKS5Error,
        SOCKS4Error, HTTPError or another GeneralProxyError if the negotiation fails; with
        `catch_errors`, their `socket_err` instead.
        """
        self._connect(dest_pair, catch_errors=catch_errors)

    def _connect(self, dest_pair, data=b'', catch_errors=None):
        """connect(), with the first `data` for a destination behind a proxy."""
        chain = self._chain(dest_pair)
        if not chain:
            return super().connect(self._go_directly(dest_pair))
        if self._is_datagram:
            return self._connect_datagrams(dest_pair, chain)
        if self._attempt:
            self._attempt.check()
        if self.proxy_peername:
            raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))
        if not self.connect_blocks and self.gettimeout() == 0 and sys.platform == 'linux':
            self._start_connect(dest_pair, chain, data)
            raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))
        try:
            run(self._connecting(dest_pair, chain, self._deadline(), data))
        except BaseException as error:
            self.close()
            if catch_errors and isinstance(error, ProxyError) and error.socket_err:
                raise error.socket_err
            raise

    def connect_ex(self, dest_pair: Any) -> int:
        """connect(), but return an errno, 0 for success; resolver errors are still raised."""
        if self.connect_error:
            return self._attempt.code
        try:
            socksocket.connect(self, dest_pair)         # a subclass's may call connect_ex()
            return 0
        except OSError as error:
            code = returned_errno(error)
            if not code:
                raise
            return code

    def _connect_datagrams(self, dest_pair, chain):
        """connect() of UDP: receive from `dest_pair` only; from all if it is ('0.0.0.0', 0)."""
        real = restore_name(dest_pair)
        destination(real, chain)        # raises before anything is sent
        self._ensure_relay(dest_pair)
        self._association.connect(self)         # from now on, all datagrams come from the relay
        # recvfrom() gives a virtual address back.
        address = run(self._target(dest_pair)) if real is dest_pair else Address.of(dest_pair)
        is_any = address.host in ('0.0.0.0', '::') and not address.port
        self.proxy_peername = None if is_any else tuple(address)

    def _start_connect(self, dest_pair, chain, data):
        """Begin to connect through the chain in the background, see `Attempt`."""
        destination(restore_name(dest_pair), chain)     # raises before anything is sent
        inner = socksocket(self.family, self.type, self.proto, proxy=[])
        with owned(inner):
            inner._copy_state(self)
            # A relay sends what it has: Nagle's algorithm would only delay that, tcp(7).
            nodelay = socket.IPPROTO_TCP, socket.TCP_NODELAY
            inner._options = {nodelay: (*nodelay, 1), **self._options}
            inner._renew(self.family)
            inner.setblocking(False)
            connecting = inner._connecting(dest_pair, chain, deadline(SETUP_TIMEOUT), data)
            try:
                with self._stock_copy() as near:
                    self._attempt = Attempt(self, near, inner, connecting)
            except OSError:             # by its options, it cannot be connected to this process
                self._replace(_orig_socket(socket.AF_INET, socket.SOCK_STREAM))
                with self._stock_copy() as near:
                    self._attempt = Attempt(self, near, inner, connecting)
        self.proxy_peername = tuple(dest_pair)
        _proxied[self.fileno()] = self

    @property
    def connect_error(self) -> Optional[BaseException]:
        return self._attempt and self._attempt.error

    def _connecting(self, dest_pair, chain, until, data):
        """Conversation: connect through the chain; `data` is the first for the destination."""
        address = destination(restore_name(dest_pair), chain)   # raises before anything is sent
        with contextlib.ExitStack() as stack:
            def connect():
                if self._proxy_address:         # the proxy does not cope with a `Flight`
                    self._renew(self.family)
                with connecting(chain[0]):
                    yield from self._connect_to_first(chain[0], until)
                return stack.enter_context(self._stock_copy())

            self._go_on(dest_pair, *(yield from open_chain(
                chain, address, until, (), self.ssl_context, data=data, connect=connect)))

    def _go_on(self, dest_pair, sock, bnd):
        """Go on with the result of negotiate_chain() for a stock copy of this socket.

        Call this inside `with self._stock_copy()`: its end sets the timeout of the descriptor,
        which would make a layer's duplicate of it blocking.
        """
        if isinstance(sock, PlainEnd):
            self._replace(sock)
        self.proxy_sockname, self.proxy_peername = tuple(bnd), tuple(dest_pair)
        _proxied[self.fileno()] = self

    def _connect_to_first(self, proxy, until):
        """Conversation: connect to the first proxy, at its addresses one after the other.

        Those of this socket's family come first, as another family needs another descriptor.
        """
        if proxy.is_path:
            return (yield from self._connect_at(socket.AF_UNIX, proxy.addr, until))
        found = yield Call(functools.partial(look_up, proxy.addr, proxy.sure_port), until)
        found = dict.fromkeys((family, sockaddr) for family, *_, sockaddr in found)
        addresses = sorted(found, key=lambda item: item[0] != self.family)[:ATTEMPTS]
        for left, (family, sockaddr) in zip(range(len(addresses), 0, -1), addresses):
            # Each gets a fair share of the time that is left, the last one all of it.
            share = (until - time.monotonic()) / left if until else ATTEMPT_TIMEOUT
            limit = until if left == 1 else deadline(min(share, ATTEMPT_TIMEOUT))
            try:
                return (yield from self._connect_at(family, sockaddr, limit))
            except OSError as error:
                if left == 1 or self.fileno() < 0:      # closed by another thread
                    raise
                log.debug('%s at %s: %s', proxy, Address.with_zone(sockaddr), error)
                self._renew(self.family)

    def _connect_at(self, family, sockaddr, until):
        """Conversation: connect to one address of the first proxy, which may change the family."""
        if family != self.family:
            if family == socket.AF_INET and self._open_to_ipv4():
                sockaddr = '::ffff:' + sockaddr[0], sockaddr[1]
            else:
                self._renew(family)
        self._bind_source(sockaddr)
        with self._stock_copy() as sock:
            yield from await_connect(sock, sockaddr, until)
        self._proxy_address = sockaddr

    def _open_to_ipv4(self):
        """Let a descriptor of IPv6 be connected to IPv4-mapped addresses; whether it can be."""
        if self.family != socket.AF_INET6:
            return False
        option = socket.IPPROTO_IPV6, socket.IPV6_V6ONLY        # a default of some systems
        with contextlib.suppress(OSError):      # it is bound, or OpenBSD's
            super().setsockopt(*option, 0)
        return not super().getsockopt(*option)

    def _renew(self, family):
        """Take over the descriptor of a new TCP socket, and apply options and bind() to it."""
        self._replace(_orig_socket(family, socket.SOCK_STREAM))
        for option in self._options.values():
            with contextlib.suppress(OSError):  # an option may be unknown to the other family
                super().setsockopt(*option)
        if self._local and self.family in IP_FAMILIES:
            is_any = self._local[0] in ZEROS    # of another family, perhaps
            super().bind(('', self._local[1]) if is_any else self._local)

    # Datagrams.  The relay is requested by bind(), connect() or the first datagram.

    def _ensure_relay(self, dest_pair=None):
        """Whether datagrams to `dest_pair`, or any if that is None, go through a relay; requests
        the relay if there is none yet."""
        self._check_open()
        if not self._association:
            self._bind_source(dest_pair)
        if (self._bypass and dest_pair or not self._association) and not self._chain(dest_pair):
            if self._association and self._association.in_tcp:
                raise OSError(errno.EHOSTUNREACH, f'{host_text(dest_pair[0])} is exempt from the '
                              'proxy, but the datagrams of this socket are in a connection to it')
            return False
        if not self._association and not dest_pair and self._bypass and self.getsockname()[1]:
            return False                # bound by datagrams that were sent directly
        with self._associating:         # threads may share the socket
            if self._association:
                self._association.check()
            else:
                run(self._associate())
        return True

    def _bind_source(self, dest_pair):
        """Bind this socket to its family's address of `default_source`, unless it is bound."""
        if (not self.default_source or not self._is_proxiable or self.family not in IP_FAMILIES
                or self.getsockname()[1]):
            return
        ip = plain_ip(str(dest_pair[0])) if dest_pair else None
        if self.family == socket.AF_INET6 and ip and ':' not in ip:     # IPv4-mapped
            super().bind(('::ffff:' + source_of(socket.AF_INET, self.default_source).host, 0))
        else:
            super().bind(source_of(self.family, self.default_source).sockaddr)

    def _is_connected(self):
        """Whether the system's socket is connected, to whatever peer, or was when accepted."""
        with contextlib.suppress(OSError):
            return bool(super().getpeername())
        return self._is_accepted

    def _deadline(self):
        """The deadline for connecting: by the timeout, or SETUP_TIMEOUT if it is non-blocking."""
        timeout = self.gettimeout()
        return deadline(SETUP_TIMEOUT if timeout == 0 else timeout)

    def _associate(self):
        """Conversation: request a relay from the proxy."""
        if self._is_connected():        # the system would drop the relay's datagrams
            raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))
        if not self.getsockname()[1]:
            self._open_to_ipv4()        # while that can be changed
            super().bind(('::' if self.family == socket.AF_INET6 else '', 0))
        port, chain, until = self.getsockname()[1], self._chain(), self._deadline()
        # A relay of this socket's family needs no other descriptor.
        connect = functools.partial(connect_to_proxy, chain[0], until, self._control_source(),
                                    self.family)
        form, control, relay = yield from open_association(
            chain, port, until, context=self.ssl_context, connect=connect)
        with owned(control):
            if form:
                association = StreamAssociation(control, form)
                self._replace(control.dup(), True)
            else:
                association = self._use_relay(control, relay, port)
            self._check_open()
            self._association, self.proxy_sockname = association.join(self), tuple(UNSPECIFIED)

    def _use_relay(self, control, relay, port):
        """The `Association` for a relay, with a descriptor of its family if necessary.

        The program does not see that: `family` stays, and addresses keep the form of it.
        """
        family = family_of(relay.host)
        if family != self.family and not (family == socket.AF_INET and self._open_to_ipv4()):
            sock = bound(source_of(family, ())._replace(port=port), socket.SOCK_DGRAM)
            with owned(sock):
                sock.connect(relay.sockaddr)
            self._replace(sock, True)
            self._bypass = ''           # the new descriptor cannot reach those hosts directly
            return Association(control, is_other=True)
        if family != self.family:
            relay = Address('::ffff:' + relay.host, relay.port)
        association = Association(control, relay.sockaddr)
        if not self._bypass:
            association.connect(self)
        return association

    def _control_source(self):
        """Local addresses for the TCP connection of an association, see dial().

        The one that this socket is bound to: a proxy accepts datagrams only from the host that made
        the TCP connection.
        """
        host = Address.with_zone(self.getsockname()).host
        host = plain_ip(host) or host
        return () if host in ZEROS else (host, '0.0.0.0' if ':' in host else '::')

    def _receive(self, size, flags=0):
        """(payload, sender, length) of the next datagram, whose payload is cut off at `size`.

        Skips datagrams that are malformed, fragments, or not from the peer of connect(), instead of
        raising an error: anyone may have sent them.  If the socket is non-blocking, at most
        MAX_SKIPPED, since an event loop has other things to do.
        """
        if size < 0:
            raise ValueError('negative buffersize')
        skipped = 0
        association, until = self._association, deadline(self.gettimeout())
        waits = self.gettimeout() != 0 and not flags & MSG_DONTWAIT
        incomplete = BLOCKED if waits else ()   # raised when only a part of a message has come
        while True:
            while waits and self not in poll(association.watched(self), (), until):
                association.check()
                if until and time.monotonic() >= until:
                    raise socket.timeout('timed out')
            with contextlib.suppress(EOFError, ProtocolError):
                try:
                    payload, sender = association.receive(self, flags)
                except incomplete:
                    continue
                if not isinstance(sender, Address):     # it came directly
                    return payload[:size], sender, len(payload)
                if self._is_from_peer(sender):
                    return payload[:size], self._sender(sender), len(payload)
            if flags & socket.MSG_PEEK:     # remove it, or it would be peeked at forever
                with contextlib.suppress(EOFError, ProtocolError):
                    association.receive(self, flags & ~socket.MSG_PEEK)
            if until and time.monotonic() >= until:     # a flood must not hold this up
                raise socket.timeout('timed out')
            skipped += 1
            if not waits and skipped == MAX_SKIPPED:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _is_from_peer(self, address):
        """Whether a datagram from `address` is from the peer of connect(), if there is one.

        If the proxy has resolved the peer's name, only the port is compared.
        """
        host, port = restore_name(self.proxy_peername or ('', 0))[:2]
        return port in (0, address.port) and plain_ip(host) in (None, plain_ip(address.host))

    def _sender(self, address):
        """The sender of a datagram as a tuple, as recvfrom() returns it.

        The proxy gives a real address.  A program that sent to a virtual one expects that back: it
        is returned if the program sent to no other host on the same port.  A name is, too, if
        `_gives_names_back`.
        """
        host, port = address
        receiver = self.proxy_peername[0] if self.proxy_peername else self._receivers.get(port)
        if receiver and self._gives_names_back and not plain_ip(receiver):
            return receiver, port
        if receiver and virtual_addresses.number(receiver) is not None:
            host = receiver
        elif virtual_addresses.is_on and virtual_addresses.knows(host):
            host = virtual_addresses.of(host)
        return self._own_tuple(Address(host, port))

    def _note_receiver(self, dest_pair):
        """Remember the host by its port, for _sender()."""
        host, port = host_text(dest_pair[0]), dest_pair[1]
        if self._receivers.setdefault(port, host) != host:
            self._receivers[port] = None
        elif len(self._receivers) > MAX_RECEIVERS:
            del self._receivers[port]

    def _own_tuple(self, address):
        """`address` as a tuple in the form of this socket's family."""
        if self.family != socket.AF_INET6:
            return tuple(address)
        host = address.host
        is_ipv4 = len(ip_bytes(host) or b'') == 4       # a name has no bytes
        return '::ffff:' + host if is_ipv4 else host, address.port, 0, 0

    def _target(self, dest_pair, until=None):
        """Conversation: the `Address` for datagrams to `dest_pair`, resolved if the proxy does not.
        """
        if dest_pair is None:
            raise OSError(errno.EDESTADDRREQ, 'Destination address required')
        chain = self._chain(dest_pair)
        address = destination(restore_name(dest_pair), chain)
        if chain and chain[-1].rdns:
            return address
        return (yield from resolve(address, until))[0]

    def _transmit(self, data, flags, dest_pair, address=None):
        """Send `data` to `dest_pair` through the relay; the number of its bytes sent.

        address     result of _target(), if the caller has it
        """
        address = address or run(self._target(dest_pair))
        if (virtual_addresses.is_on or self._gives_names_back) and not self.proxy_peername:
            self._note_receiver(dest_pair)
        return self._association.send(self, address, data, flags)

    def sendto(self, *args: Any) -> int:
        """As in stock, but because of the relay's header at most 65,497 bytes to an IPv4 address,
        and fewer to other hosts or with GSSAPI.

        A TCP socket with a proxy connects first, as with MSG_FASTOPEN; the data goes along with the
        request if the proxy is OPTIMISTIC, see `Flight`.
        """
        if len(args) > 1:
            flags, dest_pair = args[1] if len(args) > 2 else 0, args[-1]
            sent = self._send_through([args[0]], flags, dest_pair)
            if sent is not None:
                return sent
            args = (*args[:-1], self._sockaddr(dest_pair))
        return super().sendto(*args)

    def sendmsg(self, *args: Any) -> int:
        flags, address = args[2] if len(args) > 2 else 0, args[3] if len(args) > 3 else None
        if args and (address or self._is_datagram):
            sent = self._send_through(args[0], flags, address)
            if sent is not None:
                return sent
        return super().sendmsg(*args[:3], *map(self._sockaddr, args[3:]))

    def _send_through(self, buffers, flags, dest_pair):
        """Send to `dest_pair`, or the peer if that is None, through a proxy; the number of bytes
        sent, or None if what is sent there does not go through one."""
        if self._is_datagram:
            if not self._ensure_relay(dest_pair):
                return None
            return self._transmit(b''.join(buffers), flags, dest_pair or self.proxy_peername)
        if (not self.proxy[0] or self.proxy_peername or not self._chain(dest_pair)
                or self._is_connected()):
            return None
        data = b''.join(buffers)
        early = data if len(data) <= Flight.SEGMENT else b''
        try:
            self._connect(dest_pair, early)
        except BlockingIOError:         # the data goes along in the background
            if not early:
                raise
        return len(early) or self.send(data, flags & ~MSG_FASTOPEN)

    @relayed
    def send(self, bytes: Any, flags: int = 0) -> int:
        return self._transmit(bytes, flags, self.proxy_peername)

    @relayed
    def sendall(self, bytes: Any, flags: int = 0) -> None:
        self._transmit(bytes, flags, self.proxy_peername)

    @relayed
    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        return self._receive(bufsize, flags)[0]

    @relayed
    def recvfrom(self, bufsize: int, flags: int = 0) -> Tuple[bytes, Any]:
        return self._receive(bufsize, flags)[:2]

    @relayed
    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    @relayed
    def recvfrom_into(self, buffer: Any, nbytes: int = 0,
                      flags: int = 0) -> Tuple[int, Any]:
        view = memoryview(buffer).cast('B')
        if nbytes > len(view):
            raise ValueError('nbytes is greater than the length of the buffer')
        payload, sender, length = self._receive(nbytes or len(view), flags)
        view[:len(payload)] = payload
        return length if flags & socket.MSG_TRUNC else len(payload), sender

    @relayed
    def recvmsg(self, bufsize: int, ancbufsize: int = 0,
                flags: int = 0) -> Tuple[bytes, List[Tuple[int, int, bytes]], int, Any]:
        payload, sender, length = self._receive(bufsize, flags)
        return payload, [], socket.MSG_TRUNC if length > len(payload) else 0, sender

    @relayed
    def recvmsg_into(self, buffers: Iterable[Any], ancbufsize: int = 0,
                     flags: int = 0) -> Tuple[int, List[Tuple[int, int, bytes]], int, Any]:
        views = [memoryview(buffer).cast('B') for buffer in buffers]
        payload, sender, length = self._receive(sum(map(len, views)), flags)
        stream = io.BytesIO(payload)
        for view in views:
            stream.readinto(view)
        return len(payload), [], socket.MSG_TRUNC if length > len(payload) else 0, sender

    def shutdown(self, *args: int) -> None:
        if self._association:           # before another thread wakes up
            self._association.is_shut_down = True
        super().shutdown(*args)

    def dup(self) -> 'socksocket':
        """As in stock; both sockets use the relay, if there is one."""
        other = super().dup()
        other._copy_state(self)
        if self._association:
            self._association.join(other)
        return other

    def close(self) -> None:
        if self._association:
            self._association.leave(self)
        super().close()
        if self._attempt:
            self._attempt.end_if_closed()

    def get_proxy_sockname(self) -> Optional[Tuple[str, int]]:
        """(host, port) that the proxy says it connects from; None before connect()."""
        return self.proxy_sockname

    getproxysockname = get_proxy_sockname

    def get_proxy_peername(self) -> Any:
        """The address of the first proxy, as a stock getpeername() gives it; None without one."""
        return self._proxyconn.getpeername() if self._proxyconn else self._proxy_address

    getproxypeername = get_proxy_peername

    def get_peername(self) -> Any:
        """The destination, as it was given to connect(); without a proxy, as in stock.

        After wrap_module() with `dns`, the virtual address instead of a name.
        """
        address = super().getpeername()
        if (self._association and not self.proxy_peername       # connected to the relay only
                or self._attempt and not self._attempt.is_done):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if not self.proxy_peername:
            return address
        host, port = host_text(self.proxy_peername[0]), self.proxy_peername[1]
        if virtual_addresses.is_on and not ip_bytes(host.partition('%')[0]):
            return self._own_tuple(Address(virtual_addresses.of(host, self.family), port))
        return self.proxy_peername

    getpeername = get_peername

    def getsockname(self) -> Any:
        """As in stock, for datagrams through a proxy always in the form of this socket's family."""
        sockaddr = super().getsockname()
        is_other = self._association and self._association.is_other
        if not is_other or len(sockaddr) == 4 and self.family == socket.AF_INET6:
            return sockaddr
        if len(sockaddr) != 2:          # of IPv6, which an IPv4 socket has no form for, or no IP
            sockaddr = '0.0.0.0', sockaddr[1] if sockaddr else 0
        return self._own_tuple(Address(*sockaddr))

    # PySocks' private methods: subclasses that connect to the proxy themselves call them.

    @property
    def _proxyconn(self):
        return self._association and self._association.control

    def _negotiate_SOCKS5(self, *dest_addr):
        chain = self._proxies()
        with self._stock_copy() as sock:
            self._go_on(dest_addr, *run(negotiate_chain(
                sock, chain, Command.CONNECT, destination(restore_name(dest_addr), chain),
                self._deadline(), self.ssl_context)))

    _negotiate_SOCKS4 = _negotiate_HTTP = _negotiate_SOCKS5

    def _proxy_addr(self):
        first = self._proxies()[0]
        return first.addr, first.sure_port


_BaseSocket = _Descriptor               # PySocks' name


def create_connection(dest_pair: Tuple[Union[str, bytes], int], timeout: Any = None,
                      source_address: Optional[Tuple[str, int]] = None,
                      proxy_type: ProxyType = None, proxy_addr: Union[str, bytes, None] = None,
                      proxy_port: Optional[int] = None, proxy_rdns: bool = True,
                      proxy_username: Secret = None, proxy_password: Secret = None,
                      socket_options: Optional[Iterable[Sequence[Any]]] = None, *,
                      proxy: ProxyArgument = None,
                      ssl_context: Optional['ssl.SSLContext'] = None, optimistic: bool = False,
                      data: bytes = b'') -> 'socksocket':
    """Return a socksocket that is connected to `dest_pair`, (host, port), through a proxy.

    timeout           seconds for the connection, without a proxy for each address that is tried;
                      and for the socket afterwards
    source_address    (host, port) to connect from
    proxy_type, ...   as in socksocket.set_proxy()
    socket_options    tuples of arguments for setsockopt(), applied before connecting
    proxy             instead of proxy_type, ...: a URL, or a list of URLs for a chain; empty for
                      no proxy
    ssl_context       ssl.SSLContext for proxies inside TLS
    optimistic        whether to send all messages to a proxy at once, to save round trips; as with
                      `?optimistic=1` in the URL, see `Flight`
    data              the first bytes to send; if optimistic, they go along if possible

    If no proxy is given, the default proxy is used, if there is one.  Tries each address of the
    proxy; without a proxy, each of the destination.  Raises what socksocket.connect() raises.
    """
    if proxy is None and (proxy_type is not None or proxy_addr is not None):
        proxy = proxy_tuple(proxy_type or 0, proxy_addr, proxy_port, proxy_rdns, proxy_username,
                          proxy_password)
    dest_pair = (without_brackets(host_text(dest_pair[0])), *dest_pair[1:])
    chain = effective_chain(proxy, dest_pair, optimistic)
    new_socket = functools.partial(_socket_to_connect, chain, ssl_context, socket_options, timeout,
                                   source_address)
    if chain:                           # connecting changes the family if it has to
        sock = new_socket(family_of(source_address[0] if source_address else ''))
        with owned(sock):
            run(sock._connecting(dest_pair, chain, sock._deadline(), bytes(data)))
        return sock
    error = OSError('getaddrinfo() returned no address')
    for family, *_, sockaddr in look_up(*restore_name(dest_pair)[:2]):
        try:
            sock = new_socket(family)
            with owned(sock):
                sock.connect(sockaddr)
        except OSError as caught:
            error = caught
            continue
        if data:
            with owned(sock):
                sock.sendall(data)
        return sock
    try:
        raise error
    finally:
        error = None                    # breaks the cycle: error, traceback, this frame


def _socket_to_connect(chain, ssl_context, options, timeout, source_address, family):
    """A new socksocket of a family, with the arguments of create_connection() applied to it."""
    sock = socksocket(family, socket.SOCK_STREAM, proxy=chain)
    sock.ssl_context = ssl_context
    with owned(sock):
        for option in options or ():
            sock.setsockopt(*option)
        if isinstance(timeout, (int, float)):   # urllib3 passes an object for "default"
            sock.settimeout(timeout)
        if source_address:
            sock.bind(source_address)
    return sock


def effective_chain(proxy, dest_pair=None, optimistic=False):
    """The chain for an argument `proxy`; for None, that of the default proxy, which is empty if
    `dest_pair` is exempt from it."""
    if proxy is None:
        proxy, bypass = _default()
        if is_exempt(dest_pair, bypass):
            return []
    return parse_chain(proxy, OPTIMISTIC * optimistic)


class _ServerSocket(socksocket):
    """The connection to a proxy that listens for one peer (BIND, RFC 1928 section 4)."""
    _request = None                     # (proxy, target) of the request, for errors
    _unpack_reply = None                # decoder of the second reply
    _partial_reply = b''                # what came of it before accept() timed out
    _shared = (*socksocket._shared, '_request', '_unpack_reply', '_partial_reply')

    def getsockname(self) -> Any:
        """(host, port) at which the proxy listens."""
        return self.proxy_sockname

    def accept(self) -> Tuple['socksocket', Tuple[str, int]]:
        """Wait for the peer; (socket, its address).  Works once, as the socket takes over the
        connection of this one.

        Raises SOCKS5Error or SOCKS4Error if the proxy gives up, socket.timeout as in stock.
        """
        timeout = self.gettimeout()
        with negotiating(*self._request), self._stock_copy() as sock:
            stream = ExactStream(sock, time.monotonic() if timeout == 0 else deadline(timeout))
            stream.surplus = self._partial_reply
            try:
                address = run(stream.read(self._unpack_reply))
            except socket.timeout:
                address, self._partial_reply = None, stream.surplus
        if not address:
            raise socket.timeout('timed out') if timeout else BlockingIOError(
                errno.EAGAIN, os.strerror(errno.EAGAIN))
        peer = socksocket(self.family, self.type, self.proto, self.detach(), proxy=[])
        peer.settimeout(socket.getdefaulttimeout())
        peer.proxy_sockname, peer.proxy_peername = self.proxy_sockname, tuple(address)
        return peer, tuple(address)


def create_server(address: Tuple[str, int] = ('', 0), *, proxy: ProxyArgument = None,
                  timeout: Optional[float] = None,
                  ssl_context: Optional['ssl.SSLContext'] = None) -> '_ServerSocket':
    """Return a socket that accepts one connection made to the proxy (BIND, RFC 1928 section 4).

    address   (host, port) of the peer that is expected; an empty host for any, if the proxy allows
              that
    proxy     as in create_connection()
    timeout   seconds for the proxy's reply, and for the socket afterwards

    The peer must connect to the socket's getsockname(); accept() works once.  Raises what
    socksocket.connect() raises.
    """
    chain = effective_chain(proxy)
    if not chain:
        raise GeneralProxyError('No proxy specified')
    expected = destination(restore_name((address[0] or UNSPECIFIED.host, *address[1:])), chain)
    near, bnd = run(open_chain(chain, expected, deadline(timeout), socksocket.default_source,
                               ssl_context, Command.BIND))
    sock = _ServerSocket(near.family, near.type, near.proto, near.detach(), proxy=[])
    sock.settimeout(timeout)
    sock._request = chain[-1], expected
    sock._unpack_reply = {**ANSWERS, SOCKS6: functools.partial(unpack_peer6, expected)}[
        chain[-1].kind]
    sock.proxy_sockname = tuple(bnd)
    return sock


def wrap_proactor(proactor_class):
    """Make a class of asyncio's proactors (Windows' default) call socksocket.connect().

    Its own connect() passes the descriptor to the system, past the proxy.  Datagrams through a
    proxy raise OSError.
    """
    stock_connect = proactor_class.connect
    stock_sendto = getattr(proactor_class, 'sendto', None)
    if hasattr(stock_connect, '__wrapped__'):   # done by an earlier wrap_module()
        return

    def chain_of(conn, address):
        chain = conn._chain(address) if isinstance(conn, socksocket) else []
        if chain and conn._is_datagram:
            raise OSError(errno.EOPNOTSUPP, NEEDS_SELECTORS)
        return chain

    @functools.wraps(stock_connect)
    def connect(self, conn, address):
        if not chain_of(conn, address):
            address = conn._go_directly(address) if isinstance(conn, socksocket) else address
            return stock_connect(self, conn, address)
        connected = self._loop.create_future()
        conn.connect(address)
        connected.set_result(None)
        return connected

    def sendto(self, conn, buf, flags=0, addr=None):
        chain_of(conn, addr)
        return stock_sendto(self, conn, buf, flags, addr)

    proactor_class.connect = connect
    if stock_sendto:                    # since Python 3.8
        proactor_class.sendto = sendto


async def open_connection(host: str, port: int, *, proxy: ProxyArgument = None,
                          ssl_context: Optional['ssl.SSLContext'] = None,
                          timeout: Optional[float] = SETUP_TIMEOUT, optimistic: bool = False,
                          data: bytes = b'',
                          **options: Any) -> Tuple['asyncio.StreamReader', 'asyncio.StreamWriter']:
    """asyncio.open_connection() through a proxy: (reader, writer).

    proxy, ssl_context, optimistic
                          as in create_connection()
    timeout               seconds for connecting, the negotiation included
    data                  the first bytes to send; if optimistic and without `ssl`, they go along
                          with the request if possible
    options               of asyncio.open_connection(): ssl, server_hostname, limit, local_addr

    Raises what socksocket.connect() raises.
    """
    import asyncio
    chain = effective_chain(proxy, (host, port), optimistic)
    until = deadline(timeout)
    if not chain:
        reader, writer = await within(until, asyncio.open_connection(host, port, **options))
        writer.write(data)
        return reader, writer
    address = destination(restore_name((host, port)), chain)
    source = await drive(local_source(options.pop('local_addr', None), until))
    early = b'' if options.get('ssl') else bytes(data)
    sock, _ = await drive(open_chain(chain, address, until, source, ssl_context, data=early))
    if options.get('ssl'):              # asyncio has no `host` to take it from
        options.setdefault('server_hostname', host)
    # Without TLS to the destination, there is nothing more to wait for.
    until = until if options.get('ssl') else None
    with owned(sock):
        reader, writer = await within(until, asyncio.open_connection(sock=sock, **options))
    writer.write(data[len(early):])
    return reader, writer


async def create_datagram_endpoint(
        protocol_factory: Callable[[], ProtocolType],
        local_addr: Optional[Tuple[str, int]] = None, remote_addr: Optional[Tuple[str, int]] = None,
        *, family: int = 0, proxy: ProxyArgument = None,
        ssl_context: Optional['ssl.SSLContext'] = None, timeout: Optional[float] = SETUP_TIMEOUT,
        **options: Any) -> Tuple['asyncio.DatagramTransport', ProtocolType]:
    """As the method of asyncio's event loops, but through a proxy: (transport, protocol).

    family                AF_INET or AF_INET6, which decides how addresses of senders look; by
                          default that of `local_addr`, or else AF_INET
    proxy, ssl_context    as in create_connection()
    timeout               seconds for requesting the association
    options               of asyncio's method, for an endpoint without a proxy

    Names as addresses are looked up by the proxy; if it is of type socks5, by this host, without
    blocking.  The sender of an answer is the name again, unless datagrams were also sent to another
    host on the same port.  If the proxy ends the association, connection_lost() gets a
    GeneralProxyError.

    Raises what socksocket.connect() raises.
    """
    import asyncio
    loop, until = asyncio.get_event_loop(), deadline(timeout)
    chain = effective_chain(proxy, remote_addr)
    if not chain:
        return await within(until, loop.create_datagram_endpoint(
            protocol_factory, local_addr, remote_addr, family=family, **options))
    local = await drive(local_source(local_addr, until)) if local_addr else ()
    local = [address for address in local if family in (0, family_of(address.host))]
    if local_addr and not local:
        raise OSError(errno.EAFNOSUPPORT, f'{local_addr[0]} has no address of this family')
    family = family or (family_of(local[0].host) if local else socket.AF_INET)
    sock = socksocket(family, socket.SOCK_DGRAM, proxy=proxy and chain)
    with owned(sock):
        sock.ssl_context, sock._gives_names_back = ssl_context, True
        sock.settimeout(until and max(0.001, until - time.monotonic()))
        if local:
            _orig_socket.bind(sock, local[0].sockaddr)
        await drive(sock._associate())
        sock.setblocking(False)
        if remote_addr:
            if restore_name(remote_addr) is remote_addr:
                remote_addr = tuple(await drive(sock._target(remote_addr, until)))
            sock.connect(remote_addr)
        protocol = protocol_factory()
        return endpoint_class()(loop, sock, protocol), protocol


@functools.lru_cache(1)
def endpoint_class():
    """`Endpoint` as a subclass of asyncio's, which is imported only if it is needed."""
    import asyncio
    return type('DatagramTransport', (Endpoint, asyncio.DatagramTransport), {})


class Endpoint:
    """The transport of create_datagram_endpoint(): the datagrams of a non-blocking `socksocket`.

    As in asyncio, datagrams that the socket does not take are kept, and the protocol is told to
    pause while they are too many.  Those to a name that this host looks up are kept meanwhile, too.
    """

    def __init__(self, loop, sock, protocol):
        peer = sock.getpeername() if sock.proxy_peername else None
        super().__init__({'socket': sock, 'sockname': sock.getsockname(), 'peername': peer})
        self._loop = loop
        self._sock = sock
        self._protocol = protocol
        self._peer = peer
        self._watched = []              # sockets that are watched for reading
        self._queue = deque()           # arguments of _send() that wait for the socket
        self._look_ups = {}             # by address: (data that wait for it, task)
        self._size = 0                  # bytes of all that wait
        self._is_paused = self._is_closing = self._is_lost = False
        self.set_write_buffer_limits()
        try:
            for each in sock._association.watched(sock):
                loop.add_reader(each, self._read)
                self._watched.append(each)
            protocol.connection_made(self)
        except BaseException as error:
            self._unwatch()
            if isinstance(error, NotImplementedError):      # Windows' usual loop
                raise OSError(errno.EOPNOTSUPP, NEEDS_SELECTORS) from None
            raise

    def get_protocol(self):
        return self._protocol

    def set_protocol(self, protocol):
        self._protocol = protocol

    def is_closing(self):
        return self._is_closing

    def get_write_buffer_size(self):
        return self._size

    def get_write_buffer_limits(self):
        return self._low, self._high

    def set_write_buffer_limits(self, high=None, low=None):
        if high is None:
            high = 1 << 16 if low is None else 4 * low
        low = high // 4 if low is None else low
        if not high >= low >= 0:
            raise ValueError(f'limits of the buffer: expected high ({high}) >= low ({low}) >= 0')
        self._low, self._high = low, high
        self._count(0)

    def sendto(self, data, addr=None):
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f'data: expected a bytes-like object, not {type(data).__name__}')
        if self._peer and addr not in (None, self._peer):
            raise ValueError(f'address: expected None or {self._peer}')
        if self._is_closing:
            return
        data, addr = bytes(data), addr or self._sock.proxy_peername
        try:
            next(self._sock._target(addr))
        except StopIteration as stop:
            self._put(data, addr, stop.value)
        except OSError as error:
            self._protocol.error_received(error)
        else:                           # it has yielded a `LookUp`
            key = tuple(addr)
            if key not in self._look_ups:
                self._look_ups[key] = [], self._loop.create_task(self._look_up(key))
            self._look_ups[key][0].append(data)
            self._count(len(data))

    async def _look_up(self, addr):
        """Send what waits for the address of a name."""
        found = None
        try:
            found = await drive(self._sock._target(addr, deadline(SETUP_TIMEOUT)))
        except OSError as error:
            self._protocol.error_received(error)
        waiting, _ = self._look_ups.pop(addr)
        for data in waiting:
            self._count(-len(data))
            if found and not self._is_lost:
                self._put(data, addr, found)
        self._end_if_done()

    def _put(self, data, addr, target):
        """Send a datagram, or keep it if the socket does not take it; `target` is the result of
        _target() for `addr`."""
        if self._queue or not self._send(data, addr, target):
            if not self._queue:
                self._loop.add_writer(self._sock, self._write)
            self._queue.append((data, addr, target))
            self._count(len(data))

    def _send(self, data, addr, target):
        """Whether the socket has taken a datagram, or refused it."""
        try:
            if self._sock._chain(addr):
                self._sock._transmit(data, 0, addr, target)
            else:
                self._sock.sendto(data, tuple(target))
        except BLOCKED:
            return False
        except OSError as error:
            self._protocol.error_received(error)
        return True

    def _write(self):
        """The socket is writable."""
        while self._queue and self._send(*self._queue[0]) and not self._is_lost:
            data, *_ = self._queue.popleft()
            self._count(-len(data))
        if not self._queue:
            self._loop.remove_writer(self._sock)
        self._end_if_done()

    def _count(self, number):
        """So many bytes more wait: have the protocol pause or go on."""
        self._size += number
        if self._size > self._high and not self._is_paused:
            self._is_paused = True
            self._protocol.pause_writing()
        elif self._size <= self._low and self._is_paused:
            self._is_paused = False
            self._protocol.resume_writing()

    def _read(self):
        """A datagram has come, or the end of the association."""
        try:
            data, addr = self._sock.recvfrom(1 << 16)
        except BLOCKED:
            pass
        except GeneralProxyError as error:
            self._end(error)
        except OSError as error:
            self._protocol.error_received(error)
        else:
            if addr is None:            # the program has shut the socket down
                self._end(None)
            else:
                self._protocol.datagram_received(data, addr)

    def close(self):
        """Send what waits, then call connection_lost(None)."""
        self._is_closing = True
        self._unwatch()
        self._end_if_done()

    def abort(self):
        """Call connection_lost(None) at once."""
        self._end(None)

    def _end_if_done(self):
        if self._is_closing and not self._queue and not self._look_ups:
            self._end(None)

    def _end(self, error):
        if self._is_lost:
            return
        self._is_closing = self._is_lost = True
        self._unwatch()
        self._loop.remove_writer(self._sock)
        for _, task in self._look_ups.values():
            task.cancel()
        self._queue.clear()
        self._loop.call_soon(self._finish, error)

    def _unwatch(self):
        while self._watched:
            self._loop.remove_reader(self._watched.pop())

    def _finish(self, error):
        try:
            self._protocol.connection_lost(error)
        finally:
            self._sock.close()


def local_source(address, until):
    """Conversation: the local addresses for a caller's (host, port), the first of each family."""
    if not address:
        return socksocket.default_source
    found = yield Call(functools.partial(look_up, *address), until)
    # Reversed, so that the first one of a family is the one that stays.
    first = {family: Address.with_zone(sockaddr) for family, *_, sockaddr in reversed(found)}
    return tuple(first.values())


async def within(until, awaitable):
    """The result of `awaitable`; raises socket.timeout after `until`."""
    import asyncio
    try:
        return await asyncio.wait_for(awaitable, until and max(0, until - time.monotonic()))
    except asyncio.TimeoutError:
        raise socket.timeout('timed out') from None


async def drive(conversation):
    """Drive a conversation in an asyncio task, as run() does in a thread; its result."""
    advance, value = conversation.send, None
    while True:
        try:
            awaited = advance(value)
        except StopIteration as stop:
            return stop.value
        finally:
            value = None                        # as in run()
        try:
            value = await wait_in_task(awaited)
            advance = conversation.send
        except BaseException as error:          # CancelledError, too, so that it closes its sockets
            advance, value = conversation.throw, error


async def wait_in_task(awaited):
    """The answer to a `Wait` or a `Call` of a conversation, by the task's event loop."""
    import asyncio
    loop = asyncio.get_event_loop()
    if not isinstance(awaited, Wait):
        return await within(awaited.until, loop.run_in_executor(None, awaited.function))
    found, watched = loop.create_future(), []

    def tell(sock):
        if not found.done():
            found.set_result([sock])

    try:
        for sockets, watch, unwatch in ((awaited.reading, loop.add_reader, loop.remove_reader),
                                        (awaited.writing, loop.add_writer, loop.remove_writer)):
            for sock in sockets:
                watch(sock, tell, sock)
                watched.append((unwatch, sock))
        return await within(awaited.until, found)
    except socket.timeout:
        return []
    except NotImplementedError:         # Windows' usual loop
        return await loop.run_in_executor(None, poll, *awaited)
    finally:
        for unwatch, sock in watched:
            unwatch(sock)


# -------------------------------------------------------------------------------------- operation
#
# A server as a process: signals, systemd, worker processes, log files.

LONG_LIFE = 5.0                         # seconds; a worker that ends earlier is replaced later
FIRST_PAUSE = 0.1                       # seconds until then; twice as many each further time
LONGEST_PAUSE = 10.0                    # seconds


def tls_context(certificate: str, key: Optional[str] = None,
                client_ca: Optional[str] = None) -> 'ssl.SSLContext':
    """The ssl.SSLContext of a server, for TLS 1.2 and newer.

    certificate    name of a PEM file with the certificate and those that lead to it
    key            name of the PEM file with its key, which has no passphrase; None if it is in the
                   same file
    client_ca      name of a PEM file with the certificate that clients' certificates must be signed
                   by; None to ask for none

    Raises FileError, which names the option and the file that is wrong.
    """
    import ssl                          # here, because few servers need it and it is large
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if hasattr(context, 'minimum_version'):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:                               # Python 3.6
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    # Renegotiation costs the server more than the client; Python 3.6 cannot refuse it.
    context.options |= getattr(ssl, 'OP_NO_RENEGOTIATION', 0)
    encrypted = []
    try:
        # With no passphrase, instead of asking for one, which a reload in the background cannot.
        context.load_cert_chain(certificate, key, lambda: encrypted.append(key) or '')
    except OSError as error:            # whose text does not tell which file is wrong
        load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), '--tls-cert', certificate)
        fault = os.strerror(error.errno)        # PyPy sets no strerror
        if encrypted:
            fault = 'the private key is encrypted, expected one without a passphrase'
        elif isinstance(error, ssl.SSLError):
            fault = f'expected a private key for {certificate}, as PEM' + (
                f': {reason(error)}' if error.reason else '')       # else it only says "PEM lib"
        place = f'--tls-key {key}' if key else f'--tls-cert {certificate} without --tls-key'
        raise FileError(f'{place}: {fault}') from None
    if client_ca:
        load_authorities(context, '--tls-client-ca', client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def activated_sockets(environ):
    """The list of listening sockets that systemd has opened for this process (sd_listen_fds(3)).

    Removes its variables from `environ`, so that children do not take them for theirs.  Raises
    ValueError for a socket of another kind.
    """
    is_for_us = environ.pop('LISTEN_PID', '') == str(os.getpid())
    number_of_sockets = int(environ.pop('LISTEN_FDS', 0)) if is_for_us else 0
    sockets = []
    for number in range(3, 3 + number_of_sockets):
        os.set_inheritable(number, False)
        family = kind = None            # Python 3.6 does not ask the system for these
        # An error means that the descriptor is no socket.
        with contextlib.suppress(OSError), _orig_socket(fileno=os.dup(number)) as probe:
            family = probe.getsockopt(socket.SOL_SOCKET, getattr(socket, 'SO_DOMAIN', 39))
            kind = probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        if family not in (socket.AF_UNIX, *IP_FAMILIES) or kind != socket.SOCK_STREAM:
            raise ValueError(f'descriptor {number} of LISTEN_FDS: expected a TCP or unix stream '
                             f'socket')
        sock = _orig_socket(family, kind, 0, number)
        if family != socket.AF_UNIX:    # accepted sockets inherit these, see bound()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sockets.append(sock)
    return sockets


class Notifier(LoopItem):
    """Sends the state of the service to systemd (sd_notify(3)); does nothing without systemd.

    interval    seconds between two signs of life, 0 if systemd does not ask for any

    It is an item of the server's loop, so that a loop that hangs gives no signs of life.
    """

    def __init__(self, environ):
        path = environ.pop('NOTIFY_SOCKET', '')
        self._path = '\0' + path[1:] if path.startswith('@') else path     # unix(7): abstract
        is_for_us = environ.pop('WATCHDOG_PID', str(os.getpid())) == str(os.getpid())
        # Half of the time that systemd waits, as sd_watchdog_enabled(3) recommends.
        self.interval = int(environ.pop('WATCHDOG_USEC', 0)) / 2e6 if is_for_us else 0

    def notify(self, *assignments):
        """Send lines VARIABLE=VALUE."""
        if self._path:
            # systemd may be restarting; the service goes on without it.
            with contextlib.suppress(OSError), _orig_socket(
                    socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto('\n'.join(assignments).encode(), self._path)

    def notify_reloading(self):
        # With Type=notify-reload, the time tells systemd that this came after its request.
        self.notify('RELOADING=1', f'MONOTONIC_USEC={int(time.monotonic() * 1e6)}')

    def watch(self, loop):
        """Have `loop` give a sign of life every `interval` seconds."""
        self._loop = loop
        if self.interval:
            self.expire()

    def expire(self):
        self.notify('WATCHDOG=1')
        self._loop.timers.set(self, time.monotonic() + self.interval)


class Pulse(Notifier):
    """The notifier of a worker: stores the time of its last sign of life for the supervisor.

    memory      memory that both processes share, 8 bytes for each worker
    place       number of the worker, from 0
    interval    as in `Notifier`
    """

    def __init__(self, memory, place, interval):
        self._memory, self.place, self.interval = memory, place, interval
        self.notify()

    def notify(self, *_):
        struct.pack_into('d', self._memory, 8 * self.place, time.monotonic())

    def silence(self):
        """Seconds since the last sign of life."""
        return time.monotonic() - struct.unpack_from('d', self._memory, 8 * self.place)[0]


def has_terminal():
    """Whether this process has a controlling terminal that is still open (tty(4))."""
    try:
        with open('/dev/tty', 'rb', 0) as terminal:
            os.tcgetpgrp(terminal.fileno())
        return True
    except OSError:
        return False


def terminal_watch():
    """A function() that tells whether the terminal from which this process was started has been
    closed, so that HUP means to end, not to reload; never after nohup or setsid."""
    matters = (hasattr(signal, 'SIGHUP') and has_terminal()
               and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
    return lambda: matters and not has_terminal()


class Service(LoopItem):
    """Runs a server until a signal ends it.

    server       the `Server`
    configure    function() that makes its `Settings` again for a reload; may raise ValueError and
                 OSError
    notifier     a `Notifier`
    announce     function() to call when the server is ready
    lifeline     descriptor of a pipe whose other end closes when the supervisor ends, or None

    It is an item of the server's loop: reload() and show() run there, not in the signal handlers,
    which interrupt the loop at any point.
    """

    def __init__(self, server, configure, notifier, announce, lifeline=None):
        self.server = server
        self._configure = configure
        self._notifier = notifier
        self._announce = announce
        self._lifeline = lifeline
        self._stopping = False
        self._is_hung_up = terminal_watch()

    def run(self):
        """Serve until a signal, or the end of the supervisor; then close the server."""
        handlers = {'SIGINT': self.stop, 'SIGTERM': self.stop, 'SIGHUP': self.later(self.reload),
                    'SIGUSR1': self.later(self.show)}
        with self.server:
            for name, handler in handlers.items():
                if hasattr(signal, name):       # Windows has only two of them
                    signal.signal(getattr(signal, name), handler)
            # Else a signal that comes just before the poll would be handled only after it.
            signal.set_wakeup_fd(self.server.loop.waker.wakeup_fd())
            if hasattr(signal, 'pthread_sigmask'):          # a supervisor has blocked them
                signal.pthread_sigmask(signal.SIG_SETMASK, [])
            if self._lifeline is not None:
                self.server.loop.watch(self, 0, READ, self)
            self._notifier.watch(self.server.loop)
            self._notifier.notify('READY=1')
            self._announce()
            self.server.serve_forever()
            self._notifier.notify('STOPPING=1')
            signal.set_wakeup_fd(-1)

    def fileno(self):
        return self._lifeline

    def ready(self, *_):
        """The supervisor has ended: stop."""
        self.server.loop.stop()

    def later(self, function):
        """A signal handler that has the loop call function()."""
        return lambda *_: self.server.loop.call(self, function)

    def stop(self, number, _):
        """Signal handler: stop at once, or after Settings.drain_timeout for a first TERM."""
        seconds = self.server.settings.drain_timeout
        if self._stopping or number == signal.SIGINT or not seconds:
            return self.server.shutdown()
        self._stopping = True
        self._notifier.notify('STOPPING=1')
        self.server.drain(seconds)

    def reload(self):
        """Make the settings again, and have the server use them; stop if the terminal is gone."""
        if self._is_hung_up():
            return self.stop(signal.SIGHUP, None)
        self._notifier.notify_reloading()
        try:
            self.server.reconfigure(self._configure())
            log.info('reloaded')
        except (ValueError, OSError) as error:
            log.error('not reloaded, the old settings stay: %s', reason(error))
        self._notifier.notify('READY=1')

    def show(self):
        """Log a `Table` from a thread, because formatting many clients takes long."""
        try:
            threading.Thread(target=self._log_table, name='socks-table', daemon=True).start()
        except RuntimeError:            # the system has no more threads
            self._log_table()

    def _log_table(self):
        record = log.makeRecord(log.name, logging.INFO, '', 0, Table.of(self.server), (), None)
        log.handle(record)              # at any level of the log, because a user asked for it


class Table(NamedTuple):
    """The clients that a server serves now, and the sums of those before."""
    limit: int                          # of clients at once, 0 for none
    lines: Sequence[LogLine]            # of the clients now, the oldest first
    ended: int                          # number of clients before
    up: int                             # bytes from them
    down: int                           # bytes from their targets

    @classmethod
    def of(cls, server):
        """The table of a `Server`."""
        items = [item for loop in server.loops() for item in list(loop.items) if item.client]
        pairs = [(item, item.client) for item in items]     # None once a relay has ended
        lines = [client.line('open', *item.traffic) for item, client in pairs if client]
        sessions = server.sessions
        return cls(server.settings.max_clients, sorted(lines, key=lambda line: -line.seconds),
                   sessions.ended, sessions.up, sessions.down)

    def __str__(self):
        number = counted(len(self.lines), 'client')
        if self.limit:
            number = f'{len(self.lines)} of {counted(self.limit, "client")}'
        rows = [('client', 'user', 'protocol', 'command', 'target', 'up', 'down', 'seconds')]
        rows += [(*map(str, line[:5]), str(line.up), str(line.down), f'{line.seconds:.0f}')
                 for line in self.lines]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return '\n'.join([f'process {os.getpid()}: {number} now, {self.ended} before, '
                          f'with {self.up} bytes up and {self.down} down'] + [
            '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in rows])

    def entries(self):
        """A list of dictionaries for `JsonFormatter`: one of the process, one of each client."""
        about = dict(process=os.getpid(), clients=len(self.lines), limit=self.limit,
                     before=self.ended, up=self.up, down=self.down)
        return [about] + [entry for line in self.lines for entry in line.entries()]


class Supervisor:
    """Runs several worker processes that serve on the same sockets, and replaces those that end.

    size    number of workers

    The other arguments are those of `Service`.  `server` only gives its sockets and settings; each
    worker makes a server of its own.

    Theory of operation.  All signals are blocked in this process, and taken by sigwait() one by
    one, so that nothing runs in between.  SIGCHLD tells of a worker that has ended, SIGALRM that it
    is time to start one or to look for frozen ones; other signals go to the workers, too.  A worker
    ends if this process does: it watches the reading end of a pipe, `_lifeline`, whose writing end
    only this process has open.
    """

    def __init__(self, size, server, configure, notifier, announce):
        self._size = size
        self._listeners = [sock.dup() for sock in server.listeners]
        self._socket_files, server.socket_files = server.socket_files, []
        self._settings = server.settings
        self._configure = configure
        self._notifier = notifier
        self._announce = announce
        server.server_close()
        self._started = {}              # pid -> (time of its start, its `Pulse`)
        self._memory = mmap.mmap(-1, 8 * size)          # for the pulses; shared across fork()
        self._looked = time.monotonic()                 # time of the last _end_frozen()
        self._is_hung_up = terminal_watch()
        self._due = 0.0                 # time when the next worker may be started
        self._pause = FIRST_PAUSE
        self._stopping = False
        self._lifeline, self._held = os.pipe()
        self._signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1,
                         signal.SIGCHLD, signal.SIGALRM]

    def run(self):
        """Run the workers until a signal, and until all of them have ended."""
        # If the parent ignored it, waitpid() would not get the status of children.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self._start_missing()
        self._notifier.notify('READY=1')
        self._announce()
        while self._started or not self._stopping:
            self._notifier.notify('WATCHDOG=1')
            missing = len(self._started) < self._size and not self._stopping
            # Not 0, which would stop the timer.
            pauses = [max(0.001, self._due - time.monotonic())] if missing else []
            pauses += [self._notifier.interval] if self._notifier.interval else []
            signal.setitimer(signal.ITIMER_REAL, min(pauses, default=0))
            self._take(signal.sigwait(self._signals))
            self._reap()
            self._end_frozen()
            self._start_missing()
        remove_files(self._socket_files)
        self._notifier.notify('STOPPING=1')

    def _take(self, number):
        """Handle a signal."""
        if number == signal.SIGHUP and self._is_hung_up():
            number = signal.SIGTERM
        if number in (signal.SIGINT, signal.SIGTERM):
            self._stopping = True
            for sock in self._listeners:
                sock.close()
        elif number == signal.SIGHUP:
            # For the workers of later; those of now reload too, and log what is wrong.
            with contextlib.suppress(ValueError, OSError):
                self._settings = self._configure()
        if number not in (signal.SIGCHLD, signal.SIGALRM):
            for pid in self._started:
                os.kill(pid, number)    # not reaped yet, so no other process has this pid

    def _reap(self):
        """Forget the workers that have ended."""
        for pid, (started, _) in list(self._started.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._started[pid]
                now = time.monotonic()
                if not self._stopping:
                    log.error('worker %d ended with status %#x', pid, status)
                if now - started < LONG_LIFE:
                    self._back_off()
                else:
                    self._pause = FIRST_PAUSE

    def _back_off(self):
        """Start the next worker only after a pause, which doubles each time."""
        self._due = time.monotonic() + self._pause
        self._pause = min(LONGEST_PAUSE, 2 * self._pause)

    def _end_frozen(self):
        """Kill workers without a sign of life for as long as systemd waits for this process."""
        now, patience = time.monotonic(), 2 * self._notifier.interval
        # If this process did not run either (SIGSTOP, suspend), the workers start afresh.
        were_stopped, self._looked = now - self._looked > patience, now
        for pid, (_, pulse) in self._started.items() if patience else ():
            if were_stopped:
                pulse.notify()
            elif pulse.silence() > patience:
                log.error('worker %d does not answer', pid)
                os.kill(pid, signal.SIGKILL)
                pulse.notify()          # so that it is not killed again until it has ended

    def _start_missing(self):
        """Start workers up to their number, unless it is too early for the next."""
        while len(self._started) < self._size and not self._stopping:
            if time.monotonic() < self._due:
                return
            taken = {pulse.place for _, pulse in self._started.values()}
            pulse = Pulse(self._memory, min(set(range(self._size)) - taken),
                          self._notifier.interval / 2)
            try:
                pid = os.fork()
            except OSError as error:    # too many processes, or no memory; try again later
                log.error('cannot start a worker: %s', reason(error))
                return self._back_off()
            if not pid:
                self._be_worker(pulse)
            self._started[pid] = time.monotonic(), pulse

    def _share(self, settings):
        """The settings of one worker: its share of the clients."""
        # Rounded up, so that none becomes 0, which would mean no limit.
        return settings._replace(max_clients=-(-settings.max_clients // self._size))

    def _be_worker(self, pulse):
        """Serve in this process, a new worker, and exit."""
        status = 1
        try:
            os.close(self._held)        # else the pipe would stay open without the supervisor
            server = Server((), self._share(self._settings), listeners=self._listeners)
            Service(server, lambda: self._share(self._configure()), pulse, lambda: None,
                    self._lifeline).run()
            status = 0
        except Exception:
            log.exception('this is a bug')
        finally:
            logging.shutdown()
            os._exit(status)            # not up the stack, which is the supervisor's


class LogWriter(logging.Handler):
    """Writes the log to a file, or to stderr, in a thread of its own, so that logging never blocks.

    At most LIMIT lines are queued while the file takes no more.  Further ones are lost; their
    number becomes a line of the log.  After an error, which is printed to stderr once, writing is
    tried again.  If the file was moved away, a new one is created.

    Theory of operation.  handle(), in any thread, appends to `_lines` and takes no lock, as the
    thread that holds it could be stuck in a write.  `_wake` is a lock used as a signal: the thread
    waits in acquire() while there is nothing to do (`_is_idle`), and handle() releases it.  After a
    fork the thread is missing in the child; the first handle() there starts a new one.
    """
    LIMIT = 10000                       # lines
    CHUNK = getattr(select, 'PIPE_BUF', 512)    # bytes that a pipe takes as one piece (pipe(7))
    PAUSE = 0.05                        # seconds between two rounds of writing, to write more each
    RETRY = 1.0                         # seconds from an error to the next try
    PATIENCE = 1.0                      # seconds that flush() waits

    def __init__(self, path=None):
        """Open the file at `path`; None stands for stderr.  Raises OSError if that fails."""
        super().__init__()
        self._path = path
        self._file = None
        self._process = None            # pid of the process that the thread is in
        self._error = None              # errno of the error that was printed last
        self._hurry = self._ended = False
        self._lines = deque()
        try:
            self._open()
        except OSError as error:
            if error.errno != errno.ENXIO:      # fifo(7): there is no reader yet
                raise

    def handle(self, record):
        """Queue the record, as a line, and wake the thread."""
        if self._process != os.getpid():
            self._begin()
        if len(self._lines) >= self.LIMIT:
            self._lost += 1
        else:
            try:
                text = self.format(record)
            except Exception:
                return self.handleError(record)
            self._lines.append(text.encode('ascii', 'backslashreplace') + b'\n')
        if self._is_idle:
            self._is_idle = False
            with contextlib.suppress(RuntimeError):     # another thread has released it already
                self._wake.release()

    def _begin(self):
        """Start the thread, if this process has none."""
        with self.lock:
            if self._process == os.getpid():            # another thread came first
                return
            if self._process:           # after a fork: the parent writes these lines
                self._lines.clear()
            self._process, self._lost, self._is_idle = None, 0, False
            self._wake = threading.Lock()               # held while there is nothing to do
            self._wake.acquire()
            self._thread = threading.Thread(target=self._work, name='socks-log', daemon=True)
            # If the system has no more threads, the next record tries again.
            with contextlib.suppress(RuntimeError), signals_blocked():
                self._thread.start()
                self._process = os.getpid()

    def _work(self):
        """The thread: write what is queued."""
        reported = 0                    # of the lines that were lost
        while not self._ended:
            self._is_idle = True        # before the look at the queue: handle() may come between
            if not self._lines:
                self._wake.acquire()
            self._is_idle = False
            while self._lines:
                self._write(self._chunk())
            lost = self._lost - reported
            if lost:
                reported += lost
                record = log.makeRecord(log.name, logging.WARNING, '', 0,
                                        'lost %s of the log here', (counted(lost, 'line'),), None)
                self._write(self.format(record).encode() + b'\n')
            if not self._hurry:
                time.sleep(self.PAUSE)

    def _chunk(self):
        """The next lines, as many as a pipe takes without mixing them with other programs'."""
        lines = [self._lines.popleft()]
        room = self.CHUNK - len(lines[0])
        while self._lines and len(self._lines[0]) <= room:
            lines.append(self._lines.popleft())
            room -= len(lines[-1])
        return b''.join(lines)

    def _write(self, data):
        """Write all of `data`, however long that takes."""
        while data:
            try:
                self._open()
                count = self._file.write(data)
                if count:
                    data, self._error = data[count:], None
                else:                   # non-blocking and full: a fifo, or a shared stderr
                    poll((), [self._file], deadline(self.RETRY))
            except OSError as error:
                self._print(error)
                time.sleep(self.RETRY)

    def _open(self):
        """Open the file, unless it is open and still the one at its path."""
        if self._path is None:
            self._file = self._file or open(sys.stderr.fileno(), 'wb', 0, closefd=False)
            return
        if self._file:
            there = os.fstat(self._file.fileno())
            with contextlib.suppress(FileNotFoundError):        # moved away, by logrotate
                if os.path.samestat(there, os.stat(self._path)):
                    return
        # Not with mode 'a': Python 3.6 would seek, which a fifo cannot; and a fifo must not block.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, 'O_NONBLOCK', 0)
        fd = os.open(self._path, flags | getattr(os, 'O_BINARY', 0), 0o666)
        old, self._file = self._file, open(fd, 'wb', 0)
        if old:
            old.close()

    def _print(self, error):
        """Print an error to stderr, once, unless that would block."""
        if error.errno != self._error and self._path and sys.stderr:
            self._error = error.errno
            with contextlib.suppress(OSError, ValueError):      # stderr is full, or closed
                if os.name != 'posix' or poll((), [sys.stderr], time.monotonic()):
                    print(f'socks.py: {self._path}: {reason(error)}: lines of the log have to wait',
                          file=sys.stderr, flush=True)

    def flush(self):
        """Wait until all is written, at most PATIENCE seconds, as a fifo may have no reader."""
        if self._process == os.getpid() and not self._hurry:
            self._hurry = True
            until = deadline(self.PATIENCE)
            while (self._lines or not self._is_idle) and time.monotonic() < until:
                time.sleep(0.005)

    def close(self):
        """Flush, end the thread if it is not stuck in a write, and close the file."""
        self.flush()
        if self._process == os.getpid() and self._is_idle:
            self._ended = True
            with contextlib.suppress(RuntimeError):     # it is awake already
                self._wake.release()
            self._thread.join()
        if self._file and (self._ended or not self._process):
            self._file.close()
        super().close()


@contextlib.contextmanager
def signals_blocked():
    """Block all signals; a thread that is started meanwhile inherits that, and never handles one.
    """
    if not hasattr(signal, 'pthread_sigmask'):          # Windows
        yield
        return
    signals = getattr(signal, 'valid_signals', lambda: range(1, signal.NSIG))     # Python 3.8
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TextFormatter(logging.Formatter):
    """Formats a record as a line of text: the time (if `has_time`), the level, the message.

    A `Table` has several lines.  Those of a traceback are indented, so that none looks like another
    record.
    """

    def __init__(self, has_time):
        super().__init__()
        self._has_time = has_time
        self._second = None, ''         # a time in whole seconds, and its text: strftime() is slow

    def format(self, record):
        head = f'{record.levelname} '
        if self._has_time:
            second, text = self._second
            if second != int(record.created):
                second = int(record.created)
                text = time.strftime(self.default_time_format, time.localtime(second))
                self._second = second, text
            head = '%s,%03d %s' % (text, record.msecs, head)
        if isinstance(record.msg, LogLine):     # most records; all their fields are printable
            return head + str(record.msg)
        message = record.getMessage()
        lines = message.split('\n') if isinstance(record.msg, Table) else [printable_line(message)]
        lines = [head + line for line in lines]
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            lines += ['  ' + printable_line(line) for line in trace.splitlines()]
        return '\n'.join(lines)


class JsonFormatter(logging.Formatter):
    """Formats a record as a line of JSON; a `LogLine` with its fields, a `Table` as several lines.
    """

    def format(self, record):
        import json                     # here, because few servers need it
        about = {'time': round(record.created, 3), 'level': record.levelname}
        if isinstance(record.msg, (LogLine, Table)):
            entries = record.msg.entries()
        else:
            entries = [{'message': record.getMessage()}]
        if record.exc_info:
            about['traceback'] = self.formatException(record.exc_info)
        return '\n'.join(json.dumps(dict(about, **entry)) for entry in entries)


class LineRecord:
    """What a `LogWriter` and the formatters use of a logging.LogRecord, for a `LogLine`.

    Making a LogRecord takes as long as all the rest of a line.
    """
    __slots__ = ('msg', 'created', 'msecs')
    levelname, exc_info = 'INFO', None

    def __init__(self, line):
        self.msg = line
        self.created = now = time.time()
        self.msecs = int(now % 1 * 1000)


class LoggingServer(Server):
    """The server of the program, whose lines need not go through `logging`.

    writer    the `LogWriter` for them
    """

    def log_session(self, line: LogLine) -> None:
        self.writer.handle(LineRecord(line))


# ----------------------------------------------------------------------------------- command line

EPILOG = """\
examples:
  socks.py                              serve the programs on this machine
  socks.py -p 0                         take a free port and print it
  SOCKS_USERS=bob:secret socks.py -b 0.0.0.0
                                        serve bob, from everywhere
  curl -x socks5h://127.0.0.1:1080 http://example.org/
  ssh -o 'ProxyCommand=socks.py -x socks5h://proxy:1080 --connect %h:%p' host
  socks.py -x socks5h://proxy:1080 --run fetch.py http://example.org/

rules, one a line; the first that matches decides, and what none matches is denied:
  allow|deny [connect|bind|udp|resolve ...] [user NAME ...] [from NETWORK ...]
    to NETWORK|NAME|.NAME|* ... [PORT|LOW-HIGH ...] [via direct|inbound|ADDRESS|URL ...]
  .NAME stands for NAME and all names below it.  `via` chooses the way of connections and UDP:
  direct, without a proxy; from the local ADDRESS, or the one that the client connected to
  (inbound); through proxies.  Only a rule on a network inside what is local to the proxy opens
  that to other hosts.

environment:
  SOCKS_USERS                           NAME:PASSWORD pairs, separated by white space
  SOCKS_PROXY                           URLs as for -x, separated by white space
  ALL_PROXY, NO_PROXY                   --connect, --resolve, --run: the proxy if none is given,
                                        and the hosts to connect to directly

signals:
  TERM                                  stop, after --drain; a second one, or INT: at once
  HUP                                   read users, rules, certificates and proxies again; if the
                                        terminal was closed, like TERM
  USR1                                  log a table of the clients that are connected

exit status:
  0 stopped by a signal, 1 cannot start, 2 wrong usage; with --run, that of the program
"""


# Types of arguments: functions of a text that raise ValueError, see argument_type().

def argument_type(convert):
    """The argparse type for convert(text), with the message of its ValueError as the error."""
    def converted_argument(text):
        try:
            return convert(text)
        except (ValueError, GeneralProxyError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return converted_argument


def number_of(kind, end, expected, pattern=''):
    """A type: kind(text), from 0 up to but not including `end`; `pattern` is for the text."""
    def number(text):
        with contextlib.suppress(ValueError):           # kind() does not take the text
            if re.match(pattern, text) and 0 <= kind(text) < end:
                return kind(text)
        raise ValueError(f'{text!r}: expected {expected}')
    return number


# The patterns exclude '1_000' and digits of other scripts, which int() takes.
port_number = number_of(int, 65536, 'a port, 0 to 65535', '[0-9]{1,5}$')
used_port = number_of(int, 65536, 'a port, 1 to 65535', '0*[1-9][0-9]{0,4}$')
whole_number = number_of(int, float('inf'), 'a whole number, 0 or more', '[0-9]+$')
time_span = number_of(float, float('inf'), 'seconds, 0 or more', '[0-9.]+$')
ip_version = number_of(int, 7, '4 or 6', '[46]$')
not_empty = one_of('a value', bool)


def port_range(text):
    """(lowest, highest) of LOW-HIGH, or of one port."""
    low, dash, high = text.partition('-')
    with contextlib.suppress(ValueError):
        low, high = used_port(low), used_port(high if dash else low)
        if low <= high:
            return low, high
    raise ValueError(f'{text!r}: expected LOW-HIGH, from 1 to 65535')


def host_and_port(text):
    """(host, port or None) of HOST, HOST:PORT, IPV6 or [IPV6]:PORT."""
    if ip_bytes(text) is not None:
        return text, None
    host, colon, port = text.rpartition(':')
    if not colon or text.endswith(']'):
        host, port = text, None
    if host == '*':
        raise ValueError(f'{text!r}: expected 0.0.0.0 for all IPv4 addresses, :: for all of both '
                         f'families')
    bare = without_brackets(host)
    if bare == host and (not host or set(host) & set('[]:')):
        raise ValueError(f'{text!r}: expected ADDRESS, ADDRESS:PORT, IPV6 or [IPV6]:PORT')
    return bare, port if port is None else port_number(port)


def where_to_listen(text):
    """(host, port or None) as host_and_port(), or (unix:PATH, None)."""
    if not text.startswith('unix:'):
        return host_and_port(text)
    if text == 'unix:' or not hasattr(socket, 'AF_UNIX'):
        raise ValueError(f'{text!r}: expected unix:PATH, on a system with unix sockets')
    return text, None


def name_and_password(text):
    """(name, password) of NAME:PASSWORD, both bytes.  The error does not show the text."""
    name, _, password = os.fsencode(text).partition(b':')
    if not (0 < len(name) < 256 and 0 < len(password) < 256):
        raise ValueError('expected NAME:PASSWORD, of 1 to 255 bytes each')
    return name, password


def gssapi_levels(text):
    """A tuple of levels of `GssContext`, of their names with commas between."""
    names = {'clear': GssContext.CLEAR, 'integrity': GssContext.INTEGRITY,
             'confidentiality': GssContext.CONFIDENTIALITY}
    words = text.split(',')
    if not set(words) <= set(names):
        raise ValueError(f'{text!r}: expected some of {", ".join(names)}')
    return tuple(names[word] for word in words)


def ip_address(text):
    """The text of an IP address, v4-mapped ones as IPv4."""
    ip = plain_ip(text)
    if ip is None:
        raise ValueError(f'{text!r}: expected an IP address')
    return ip


def source_address(text):
    """The text of an IP address; a link-local one may have a zone."""
    return text if '%' in text and ip_bytes(text) else ip_address(text)


def worker_count(text):
    """A number of processes; auto stands for one for each processor."""
    number = min(1024, processors())
    if text != 'auto':
        number = int(text) if re.match('[0-9]{1,4}$', text) else 0
    if not 0 < number <= 1024 or number > 1 and not hasattr(os, 'fork'):
        raise ValueError(f'{text!r}: expected auto, or a number, 1 to 1024'
                         + ('' if hasattr(os, 'fork') else '; on this system only 1'))
    return number


def host_with_port(text):
    """(host, port) of HOST:PORT."""
    with contextlib.suppress(ValueError):
        host, port = host_and_port(text)
        if port:
            return host, port
    raise ValueError(f'{text!r}: expected HOST:PORT, or [IPV6]:PORT')


DEFAULTS = Settings()

# (title of a group, its options); an option is (flags, arguments of add_argument()), where `type`
# goes through argument_type().
OPTIONS = [
    ('listening', [
        (('-b', '--bind'), dict(
            metavar='ADDRESS[:PORT]', type=where_to_listen, action='append', default=[],
            help='address or name to listen on, :: for all addresses of both families, or '
                 'unix:PATH; repeatable (default: 127.0.0.1)')),
        (('-p', '--port'), dict(
            metavar='PORT', type=port_number, default=1080,
            help='port where --bind has none, 0 for a free one (default: %(default)s)')),
        (('-w', '--workers'), dict(
            metavar='N', type=worker_count, default=1,
            help='serve with N processes; auto: one for each processor (default: %(default)s)')),
        (('--unix-mode',), dict(
            metavar='OCTAL', type=as_mode,
            help='permissions of unix sockets, which decide who may connect (default: 600, less '
                 'the umask)')),
        (('--no-http',), dict(
            action='store_false', dest='http', help='serve SOCKS only (default: HTTP, too)')),
        (('--socks6',), dict(
            action='store_true', help='serve SOCKS6, too, an individual draft that has expired '
                                      '(draft-olteanu-intarea-socks-6-11)')),
        (('--proxy-protocol',), dict(
            metavar='NETWORK', type=parse_network, action='append', default=[], dest='balancers',
            help='expect a PROXY header from load balancers in NETWORK, 127.0.0.1/32 for those on '
                 'a unix socket; repeatable (default: none)'))]),
    ('TLS', [
        (('--tls-cert',), dict(
            metavar='FILE', help="the server's certificate and its chain; clients must use TLS "
                                 '(default: no TLS)')),
        (('--tls-key',), dict(
            metavar='FILE', help='its key, without a passphrase (default: in the same file)')),
        (('--tls-client-ca',), dict(
            metavar='FILE', help='serve only clients with a certificate signed by the one in FILE; '
                                 'its common name is the user name')),
        (('--udp-over-plain',), dict(
            action='store_true', help='allow UDP with TLS, although datagrams are in the clear'))]),
    ('who may use it', [
        (('-u', '--user'), dict(
            metavar='NAME:PASSWORD', type=name_and_password, action='append', default=[],
            dest='users', help='name and password of a user, repeatable; clients must then log in; '
                               'others on this machine can see it, but not SOCKS_USERS, see below '
                               '(default: no users)')),
        (('--users',), dict(
            metavar='FILE', dest='users_file',
            help='read users from FILE, lines NAME:PASSWORD or NAME:HASH')),
        (('--hash-password',), dict(
            action='store_true', help='read a password from the terminal or stdin, print its HASH, '
                                      'and exit')),
        (('--from',), dict(
            metavar='NETWORK', type=parse_network, action='append', default=[], dest='clients',
            help='serve only clients in NETWORK, repeatable (default: anywhere)')),
        (('--trust',), dict(
            metavar='NETWORK', type=parse_network, action='append', default=[], dest='trusted',
            help='ask clients in NETWORK for no password, repeatable (default: none)')),
        (('--gssapi',), dict(
            action='store_true', dest='by_gssapi',
            help='authenticate clients by Kerberos, too, with the keys of the service rcmd')),
        (('--gssapi-level',), dict(
            metavar='LEVELS', type=gssapi_levels,
            help='levels of protection that clients may choose, of clear, which curl needs, '
                 'integrity and confidentiality (default: integrity,confidentiality)')),
        (('--gssapi-nec',), dict(
            action='store_true', help="agree on the level without protection, as NEC's programs "
                                      'do; an attacker on the way can lower it')),
        (('--keytab',), dict(
            metavar='FILE', help='keys for --gssapi (default: those in KRB5_KTNAME, or the '
                                 "system's)")),
        (('--ident',), dict(
            action='store_true', help='ask the host of a SOCKS4 client for the user (RFC 1413), '
                                      'and refuse the client if its request names another')),
        (('--open',), dict(
            action='store_true',
            help='serve everybody: allow an address beyond loopback without users')),
        (('--max-clients',), dict(
            metavar='N', type=whole_number, default=DEFAULTS.max_clients,
            help='serve at most N clients at once, others wait (default: as many as the limit of '
                 'open files allows)')),
        (('--max-per-client',), dict(
            metavar='N', type=whole_number, default=DEFAULTS.max_per_client,
            help='serve at most N connections at once from one IPv4 address or IPv6 /64, 0 for no '
                 'limit; with -w, in each process (default: no limit for this host; for others '
                 'half of --max-clients, at least 64, but no more than three quarters)')),
        (('--max-handshakes',), dict(
            metavar='N', type=whole_number, default=DEFAULTS.max_handshakes,
            help='serve at most N clients at once that have not sent their request; for one more, '
                 'the oldest from the address with most of them is dropped; with -w, N in each '
                 'process (default: half of --max-clients, at least 64, but no more than three '
                 'quarters)'))]),
    ('what they may do', [
        (('--rules',), dict(
            metavar='FILE', dest='rules_file',
            help='read from FILE what clients may reach, see below (default: all but what is local '
                 'to the proxy)')),
        (('--check',), dict(
            action='store_true', help='check options and files, but not whether the addresses are '
                                      'free; print all errors or a summary, and exit')),
        (('--tor-extensions',), dict(
            action='store_true', help="offer Tor's look-up commands, RESOLVE and RESOLVE_PTR")),
        (('--udp-strict',), dict(
            action='store_true', help='pass on datagrams only from targets that the client has '
                                      'sent to (default: from anywhere)'))]),
    ('addresses', [
        (('-4',), dict(
            action='store_const', const=4, default=DEFAULTS.family, dest='family',
            help='connect to IPv4 addresses only')),
        (('-6',), dict(
            action='store_const', const=6, default=DEFAULTS.family, dest='family',
            help='connect to IPv6 addresses only')),
        (('--prefer',), dict(
            metavar='4|6', type=ip_version, default=DEFAULTS.prefer,
            help='try addresses of this version of IP first (default: as the system routes)')),
        (('--source',), dict(
            metavar='ADDRESS', type=source_address, action='append', default=[],
            help='connect from this local address, repeatable: one IPv4, one IPv6 (default: as the '
                 'system routes)')),
        (('--advertise',), dict(
            metavar='ADDRESS', type=ip_address, action='append', default=[],
            help='address to send to clients of BIND and UDP ASSOCIATE, for a proxy behind NAT, '
                 'repeatable: one IPv4, one IPv6 (default: the one that the client connected '
                 'to)')),
        (('--udp-ports',), dict(
            metavar='LOW-HIGH', type=port_range, default=DEFAULTS.udp_ports,
            help='ports that clients send datagrams to (default: any)')),
        (('--udp-port',), dict(
            metavar='PORT', type=used_port, default=DEFAULTS.udp_port,
            help='port that all clients send datagrams to; those with the same IP address are '
                 'told apart by the port that they send from, the one announced in their request '
                 'or that of their first datagram (default: a port for each association)'))]),
    ('timeouts, in seconds, 0 for none', [
        ((f'--{name}-timeout',), dict(
            metavar='SECONDS', type=time_span, default=getattr(DEFAULTS, f'{name}_timeout'),
            help=f'{what} (default: %(default)g)'))
        for name, what in (
            ('handshake', 'from accept to the end of the request'),
            ('connect', 'for connecting to the target'),
            ('bind', 'for the peer of BIND to connect'),
            ('idle', 'for a connection without traffic'),
            ('udp', 'for an association without datagrams, four times as long while targets '
                    'send'))] + [
        (('--drain',), dict(
            metavar='SECONDS', type=time_span, default=DEFAULTS.drain_timeout, dest='drain_timeout',
            help='for clients to end by themselves after TERM (default: %(default)g)'))]),
    ('through other proxies', [
        (('-x', '--proxy'), dict(
            metavar='URL', type=parse_proxy_url, action='append', default=[], dest='upstream',
            help='send connections and, if the last is of SOCKS5 or 6, UDP through this proxy; '
                 'repeatable, for a chain, first hop first.  URL is '
                 'SCHEME://[USER:PASSWORD@]HOST[:PORT]; SCHEME is socks5h, socks5, socks4a, '
                 'socks4, socks6h, socks6, http (port 8080) or https (443, the others 1080), with '
                 '+tls, +gssapi or +unix appended if wanted; append ?optimistic=1 to send it all '
                 'messages at once, ?udp=tcp to have datagrams in the connection, or both with & '
                 'between them.  Others on this machine can see a password in it, but not in '
                 'SOCKS_PROXY, see below (default: '
                 'SOCKS_PROXY)')),
        (('--proxy-file',), dict(
            metavar='FILE', help='read the URLs from FILE, one a line (default: SOCKS_PROXY)')),
        (('--connect',), dict(
            metavar='HOST:PORT', type=host_with_port,
            help='do not serve: join stdin and stdout to a connection through the proxy, or to a '
                 'direct one if NO_PROXY names the host')),
        (('--resolve',), dict(
            metavar='NAME', help='do not serve: print the address of a name, or the name of an '
                                 "address, as the proxy finds it by Tor's extension")),
        (('--run',), dict(
            metavar='PROGRAM', nargs=argparse.REMAINDER, type=str,
            help='do not serve: run a Python script, or a module after -m, with its arguments, and '
                 'send all its sockets through the proxy'))]),
    ('logging', [
        (('-v', '--verbose'), dict(action='store_true', help='log every step')),
        (('-q', '--quiet'), dict(action='store_true', help='log only warnings and errors')),
        (('--log-file',), dict(
            metavar='FILE',
            help='append the log to FILE, which may be a fifo; if it is moved away, create it '
                 'again (default: stderr)')),
        (('--log-format',), dict(
            choices=('text', 'json'), default='text',
            help='format of the log (default: %(default)s)')),
        (('-V', '--version'), dict(action='version', version=f'socks.py {__version__}'))]),
]


def build_parser():
    """The argparse.ArgumentParser of the command line."""
    parser = argparse.ArgumentParser(
        prog='socks.py', usage='%(prog)s [options]', epilog=EPILOG,
        description='A proxy for SOCKS4, SOCKS4a, SOCKS5 and HTTP.\nWithout options, it serves the '
                    'programs on this machine, on 127.0.0.1:1080.',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, options in OPTIONS:
        group = parser.add_argument_group(title)
        for flags, details in options:
            if 'metavar' in details:    # a value; it is empty if a shell variable is not set
                details = dict(details, type=argument_type(details.get('type', not_empty)))
            group.add_argument(*flags, **details)
    # -4 and -6 would have argparse take the number in "--idle-timeout -1" for an option.
    parser._has_negative_number_optionals.clear()
    return parser


def suggestion(parser, unknown):
    """The end of the error about unknown options: similar ones, or ''."""
    import difflib                      # here, because it is only needed to fail
    word = unknown[0].partition('=')[0]
    options = [flag for flag in parser._option_string_actions if flag.startswith('--')]
    shortened = re.compile('.*'.join(map(re.escape, word)))     # --maxper
    similar = [*filter(shortened.match, options), *difflib.get_close_matches(word, options, 2, 0.7)]
    return f'; is {" or ".join(dict.fromkeys(similar))} meant?' if word[2:] and similar else ''


def settings_from(args, environ):
    """The `Settings` for parsed arguments and the environment.

    Reads the files that the arguments name, so a reload calls it again.  Raises ValueError for
    arguments that contradict each other, FileError for a wrong file.
    """
    try:
        pairs = args.users + [name_and_password(text)
                              for text in environ.get('SOCKS_USERS', '').split()]
    except ValueError as error:
        raise ValueError(f'SOCKS_USERS: {error}, pairs separated by white space') from None
    users = dict(pairs)
    if len(users) < len(pairs):
        raise ValueError('-u, SOCKS_USERS: a user is given twice')
    if args.udp_port and args.workers > 1:
        raise ValueError('--udp-port: expected one worker process; with -w, a datagram may come to '
                         'another process than its association')
    for name in ('source', 'advertise'):
        hosts = getattr(args, name)
        if len(set(map(family_of, hosts))) < len(hosts):
            raise ValueError(f'--{name}: expected at most one IPv4 and one IPv6 address')
    # Most options have the name of a field as their `dest`.
    fields = {name: tuple(value) if isinstance(value, list) else value
              for name, value in vars(args).items() if name in Settings._fields}
    if args.by_gssapi:
        fields['gssapi'] = args.gssapi_level or (GssContext.INTEGRITY, GssContext.CONFIDENTIALITY)
        if args.keytab:
            os.environ['KRB5_KTNAME'] = args.keytab     # GSSAPI has no function to set it
    elif args.keytab or args.gssapi_nec or args.gssapi_level:
        raise ValueError('--gssapi-level, --gssapi-nec, --keytab: expected --gssapi')
    if (args.tls_key or args.tls_client_ca or args.udp_over_plain) and not args.tls_cert:
        raise ValueError('--tls-key, --tls-client-ca, --udp-over-plain: expected --tls-cert')
    # All files are read even if one is wrong, for --check to show every error.
    more_users, rules, tls = all_of(lambda read, path, *more: read(path, *more) if path else None, [
        (read_users, args.users_file), (read_rules, args.rules_file),
        (tls_context, args.tls_cert, args.tls_key, args.tls_client_ca)])
    users.update(more_users or {})
    settings = Settings(**dict(fields, users=MappingProxyType(users), rules=rules, tls=tls,
                               upstream=tuple(chain_from(args, environ))))
    for warning in warnings_about(settings):
        log.warning('%s', warning)
    return settings


def warnings_about(settings):
    """The texts of warnings about rules that are probably mistakes."""
    rules, names = settings.rules or (), {'-', *map(printable, map(name_text, settings.users))}
    by_other_ways = (settings.gssapi or settings.ident
                     or settings.tls and settings.tls.verify_mode)      # CERT_NONE is 0
    for rule in rules if not by_other_ways else ():     # those users are not known beforehand
        for user in rule.users:
            if user not in names:
                yield f'{rule.place}: user {user} does not exist'
    for rule, further in zip(rules, rules[1:]):
        if not any(rule[1:8]):          # no condition, and no way that others may stand in for
            yield f'{further.place}: never reached, {rule.place} matches everything'
            break


def raise_descriptor_limit(wanted=65536):
    """Raise the soft limit of open files to the hard one, or to `wanted` if that is lower.

    The soft one is often 1024, for programs that use select(2); this one does not.
    """
    if resource:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(ValueError, OSError):      # macOS may allow less than `hard`
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def set_up_logging(args, environ, serves):
    """Configure the root logger; raises OSError if the log file cannot be opened.

    Only a server (`serves`), or a file, has a `LogWriter`, which may lose lines.
    """
    handler = logging.StreamHandler()
    if args.log_file and not args.check:
        handler = LogWriter(args.log_file)
    elif serves:
        with contextlib.suppress(OSError, AttributeError):      # stderr is closed, or replaced
            handler = LogWriter()
    # systemd.exec(7): stderr goes to the journal, which adds the time itself.
    is_journal = 'JOURNAL_STREAM' in environ and not args.log_file
    handler.setFormatter(JsonFormatter() if args.log_format == 'json' else
                         TextFormatter(has_time=not is_journal))
    level = logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=level, handlers=[handler])


def chain_from(args, environ):
    """A list of the `Proxy`s for CONNECT: of -x, else of the file, else of SOCKS_PROXY.

    Raises ValueError, or FileError if the file is wrong.
    """
    if args.upstream and args.proxy_file:
        raise ValueError('-x, --proxy-file: expected only one of them')
    urls = [('SOCKS_PROXY', url) for url in environ.get('SOCKS_PROXY', '').split()]
    if args.proxy_file:
        urls = [(place, line.decode('utf-8', 'replace'))
                for place, line in read_lines('--proxy-file', args.proxy_file)]
        warn_if_readable(args.proxy_file)
        if not urls:
            raise FileError(f'--proxy-file {args.proxy_file}: expected at least one URL')
    chain = [*args.upstream]
    for place, url in () if chain else urls:
        try:
            chain.append(parse_proxy_url(url))
        except (ValueError, GeneralProxyError) as error:
            raise (FileError if args.proxy_file else ValueError)(f'{place}: {error}') from None
    return parse_chain(chain)


def environment_hops(host=None, port=None):
    """A list of the `Proxy`s of ALL_PROXY for a host, empty if NO_PROXY names it; ValueError if it
    is wrong."""
    try:
        return parse_chain(proxy_from_environment(host, port))
    except (ValueError, GeneralProxyError) as error:
        raise ValueError(f'ALL_PROXY: {error}') from None


def client_command(args):
    """Do --connect or --resolve; returns the exit status."""
    # If stdin or stdout is closed, its descriptor must not become the socket's.
    spare = 0
    while spare < 3:
        spare = os.open(os.devnull, os.O_RDWR)
    os.close(spare)
    host, port = args.connect or (args.resolve, 0)
    chain = chain_from(args, os.environ) or environment_hops(args.connect and host, port)
    bypass = os.environ.get('no_proxy') or os.environ.get('NO_PROXY') or ''
    if args.connect and is_bypassed(host, bypass, port):
        chain = []
    elif args.connect and not chain:
        raise ValueError(f'--connect: expected a proxy, -x URL or ALL_PROXY, or {printable(host)} '
                         f'in NO_PROXY, to connect directly')
    until = deadline(args.connect_timeout)
    try:
        if args.resolve:
            print(printable(resolve_through(chain, host, until, args.source)))
        elif chain:
            sock, _ = run(open_chain(chain, destination((host, port), chain), until, args.source))
            copy_stdio(sock)
        else:
            copy_stdio(run(connect_by_name(host, port, until, args.source)))
    except (BrokenPipeError, KeyboardInterrupt):        # the reader of stdout, or the user, is gone
        return 1
    except OSError as error:
        print(printable_line(f'socks.py: {Address(host, port) if port else host}: {reason(error)}'),
              file=sys.stderr)
        return 1
    return 0


def resolve_through(chain, host, until, source):
    """The IP address of a name, or the name of an IP address, text, as the last proxy finds it by
    Tor's extension."""
    if not chain or chain[-1].kind == HTTP:
        raise ValueError('--resolve: expected a SOCKS proxy, -x URL')
    chain = [*chain[:-1], chain[-1]._replace(rdns=True)]        # socks5:// would resolve it here
    command = Command.RESOLVE if ip_bytes(host) is None else Command.RESOLVE_PTR
    return run(ask_for(command, chain, (host, 0), until, source))


def copy_stdio(sock):
    """Copy stdin to the socket in a thread, and the socket to stdout, each up to its end."""
    for fd in (0, 1) if hasattr(os, 'set_blocking') else ():    # as whoever shares them left them
        os.set_blocking(fd, True)
    with sock, open(1, 'wb', 0) as out:
        sock.settimeout(None)
        upward = threading.Thread(target=copy_stdin, args=(sock,), daemon=True)
        upward.start()
        # Without a buffer, for interactive use; so write() may take less than it is given.
        for data in iter(functools.partial(sock.recv, 1 << 18), b''):
            while data:
                data = data[out.write(data):]
        out.close()
        if not os.isatty(0):            # a user has no reason to press the key that ends the input
            upward.join()


def copy_stdin(sock):
    """Copy stdin to the socket, and end its sending direction."""
    with contextlib.suppress(OSError):  # of the socket: the other thread raises it
        for data in iter(functools.partial(os.read, 0, 1 << 18), b''):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def program_runner(arguments, chain):
    """A function() that runs a Python script, or a module after -m, in this process, whose sockets
    go through the proxies from here on.

    arguments    of --run: ['-m'], the program, and its own arguments
    chain        list of `Proxy`

    The program remains `__main__` after its last line: its threads, and the functions of atexit,
    may pickle its objects.  (runpy's public functions undo that.)

    Raises ValueError if one is missing.
    """
    import importlib.util
    import pkgutil
    import runpy
    is_module = arguments[:1] == ['-m']
    program, *rest = arguments[is_module:] or ['']
    if not program:
        raise ValueError('--run: expected a Python script, or -m and a module')
    if not chain:
        raise ValueError('--run: expected a proxy, ALL_PROXY or -x URL before --run')
    if not is_module and not os.access(program, os.R_OK):
        raise ValueError(f'--run: there is no Python script {program}, or it cannot be read')
    is_archive = not is_module and pkgutil.get_importer(program) is not None    # or a directory
    code = None if is_module or is_archive else code_of(program)
    path = os.path.abspath(program)
    # As the interpreter sets it; the search for a module uses it.
    place = path if is_archive else os.getcwd() if is_module else os.path.dirname(path)
    if not (sys.flags.isolated or getattr(sys.flags, 'safe_path', False)):      # -I, or -P of 3.11
        sys.path[0] = place
    elif is_archive:
        sys.path.insert(0, place)
    if is_module and not importlib.util.find_spec(program.partition('.')[0]):
        raise ValueError(f'--run: there is no module {program}')
    wrap_process(chain, os.environ.get('no_proxy') or os.environ.get('NO_PROXY') or '')
    sys.argv = [program, *rest]
    sys.modules['__main__'] = main_module = type(sys)('__main__')
    if code:
        main_module.__dict__.update(__file__=path, __cached__=None)
        return functools.partial(exec, code, main_module.__dict__)
    return functools.partial(runpy._run_module_as_main, program if is_module else '__main__',
                             alter_argv=is_module)


def code_of(program):
    """The code object of a Python script, or of a compiled one.  Raises ValueError."""
    import pkgutil
    with open(program, 'rb') as file:
        source = file.read()            # at once: it may be a pipe
    try:
        return (pkgutil.read_code(io.BytesIO(source))
                or compile(source, program, 'exec', dont_inherit=True))
    except (SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f'--run: {program} is not a Python script: {error}') from None


# Code that runs first in a process that multiprocessing starts with a new interpreter: it imports
# this file, whatever its name, as the module socks.
CHILD_START = ("import json, os, sys; from importlib import machinery, util; "
               "s = util.spec_from_loader('socks', machinery.SourceFileLoader("
               "'socks', json.loads(os.environ['SOCKS_RUN'])['file'])); "
               "sys.modules['socks'] = m = util.module_from_spec(s); s.loader.exec_module(m); "
               "m.wrap_child(); ")


def wrap_process(chain, bypass):
    """Send the sockets of this process, and of those that multiprocessing starts, through proxies.

    chain     list of `Proxy`
    bypass    hosts to connect to directly, as in NO_PROXY

    The environment variable SOCKS_RUN passes both on, as JSON; it also has the passwords, which
    other users cannot see there.
    """
    import json
    os.environ['SOCKS_RUN'] = json.dumps({
        'file': os.path.abspath(__file__), 'bypass': bypass, 'source': socksocket.default_source,
        'chain': [[field.decode('latin-1') if isinstance(field, bytes) else field
                   for field in proxy] for proxy in chain]})
    set_default_proxy(chain, bypass=bypass)
    wrap_module(sys.modules[__name__], dns=True)
    try:
        from multiprocessing import spawn, util     # after socket.socket was replaced
    except ImportError:                 # this Python has no multiprocessing
        return
    for module, name in ((spawn, 'get_command_line'), (util, 'spawnv_passfds')):
        setattr(module, name, starting_wrapped(getattr(module, name)))


def starting_wrapped(function):
    """Wrap a function of multiprocessing: if an argument or the result is the command line of a
    child, [..., '-c', CODE, ...], CHILD_START is put before CODE."""
    def begun(value):
        if isinstance(value, list) and '-c' in value[:-1]:
            place = value.index('-c') + 1
            code = value[place]
            # The resource tracker makes no connections, so it starts as it is.
            if 'multiprocessing' in code and not code.startswith(CHILD_START) and (
                    '_tracker' not in code):
                return [*value[:place], CHILD_START + code, *value[place + 1:]]
        return value

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return begun(function(*map(begun, args), **kwargs))
    return wrapper


def wrap_child():
    """In a child: call wrap_process() with the arguments from the parent."""
    import json
    parent = json.loads(os.environ['SOCKS_RUN'])
    socksocket.default_source = tuple(parent['source'])
    wrap_process([Proxy(*fields[:4], *(field and field.encode('latin-1') for field in fields[4:]))
                  for fields in parent['chain']], parent['bypass'])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line `argv`, by default sys.argv[1:]; returns the exit status.

    Wrong usage ends in SystemExit with status 2, as argparse does.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f'unrecognized arguments: {" ".join(unknown)}{suggestion(parser, unknown)}')
    tasks = [task for task in (args.connect, args.resolve, args.run) if task is not None]
    try:
        # The program of --run may configure logging itself.
        if args.run is None or args.verbose or args.log_file:
            set_up_logging(args, os.environ, not (tasks or args.check))
    except OSError as error:
        print(f'socks.py: --log-file {args.log_file}: {reason(error)}', file=sys.stderr)
        return 1
    if args.hash_password:
        return print_hash()
    if len(tasks) + args.check > 1:
        parser.error('--check, --connect, --resolve, --run: expected only one of them')
    try:
        if args.run is None:
            return client_command(args) if tasks else serve(args)
        socksocket.default_source = tuple(args.source)      # first: it is passed on to processes
        program = program_runner(args.run, chain_from(args, os.environ) or environment_hops())
    except (ValueError, GeneralProxyError) as error:
        parser.error(str(error))
    program()                           # its own errors are not wrong usage
    return 0


def print_hash():
    """Read a password, and print its hash for a file of users; returns the exit status."""
    password = b''
    try:
        if sys.stdin and sys.stdin.isatty():
            from getpass import getpass
            password = os.fsencode(getpass('Password: '))
            if password and os.fsencode(getpass('Again: ')) != password:
                print('socks.py: the passwords differ', file=sys.stderr)
                return 1
        elif sys.stdin:
            password = sys.stdin.buffer.readline().rstrip(b'\r\n')
    except (EOFError, KeyboardInterrupt):       # the user gave up
        print(file=sys.stderr)
        return 1
    if not 0 < len(password) < 256:
        print('socks.py: expected a password of 1 to 255 bytes', file=sys.stderr)
        return 1
    return 0 if print_at_once(Hashed.make(password)) else 1


def print_at_once(line):
    """Print a line to stdout; returns whether that was possible."""
    try:
        print(line, flush=True)
        return bool(sys.stdout)
    except OSError as error:
        print(f'socks.py: stdout: {reason(error)}', file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # Python flushes stdout again at its exit
        return False


def serve(args):
    """Serve until a signal; returns the exit status.

    Raises ValueError for arguments that contradict each other.
    """
    raise_descriptor_limit()
    # The log shows none of these, and they take time ("Optimization" in Python's logging HOWTO).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    configure = functools.partial(settings_from, args, dict(os.environ))
    try:
        settings = configure()
        if args.check:
            return check(settings, addresses_of(args))
        # Before any child is started: they take the variables of systemd out of the environment.
        notifier = Notifier(os.environ)
        writer = logging.getLogger().handlers[0]
        server_class = Server if args.quiet or not isinstance(writer, LogWriter) else LoggingServer
        server = server_class(addresses_of(args), settings,
                              listeners=activated_sockets(os.environ))
        server.writer = writer
    except (FileError, OSError) as error:
        faults = error.args if args.check and isinstance(error, FileError) else [reason(error)]
        for fault in faults:
            print(f'socks.py: {fault}', file=sys.stderr)
        return 1
    warn_of_shown_passwords(args)
    announce = functools.partial(announce_addresses, server.addresses,
                                 0 in (port for _, port in addresses_of(args)), settings.upstream)
    if args.workers == 1:
        Service(server, configure, notifier, announce).run()
    else:
        Supervisor(args.workers, server, configure, notifier, announce).run()
    log.info('stopped')
    return 0


def check(settings, addresses):
    """Do --check for settings that were read without an error: print a summary, or raise what a
    start would raise, except for failures to bind.  Returns the exit status."""
    refuse_open_proxy(prepared(settings), [
        Address(host, port) for host, port in addresses if ip_bytes(host)])
    summary = counted(len(settings.users), 'user')
    if settings.rules is not None:
        summary += ', ' + counted(len(settings.rules), 'rule')
    return 0 if print_at_once(summary + ': ok') else 1


def warn_of_shown_passwords(args):
    """Log a warning for passwords in the command line, which ps(1) shows."""
    if args.users:
        log.warning('-u shows passwords to all users of this machine, SOCKS_USERS does not')
    if any(proxy.password for proxy in args.upstream):
        log.warning('-x shows passwords to all users of this machine, SOCKS_PROXY does not')


def announce_addresses(addresses, to_stdout, chain):
    """Log the addresses of a server and its chain, and print the addresses for scripts to read."""
    for address in addresses:
        if to_stdout:
            print_at_once(f'listening on {address}')
        log.info('listening on %s', address)
    if chain:
        log.info('through %s', ', then '.join(proxy.place for proxy in chain))


def addresses_of(args):
    """A list of the (host, port) to listen on."""
    return [(host, args.port if port is None else port)
            for host, port in args.bind or [('127.0.0.1', None)]]


if IS_PROGRAM:
    sys.exit(main())
