from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HelloRequest(_message.Message):
    __slots__ = ("callee",)
    CALLEE_FIELD_NUMBER: _ClassVar[int]
    callee: str
    def __init__(self, callee: _Optional[str] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("process", "proof")
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    process: bytes
    proof: bytes
    def __init__(self, process: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class SealedAnswer(_message.Message):
    __slots__ = ("answer", "seal")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    answer: bytes
    seal: bytes
    def __init__(self, answer: _Optional[bytes] = ..., seal: _Optional[bytes] = ...) -> None: ...

class Origin(_message.Message):
    __slots__ = ("cluster_label", "storage_fingerprint", "protocol", "callee")
    CLUSTER_LABEL_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CALLEE_FIELD_NUMBER: _ClassVar[int]
    cluster_label: str
    storage_fingerprint: bytes
    protocol: int
    callee: str
    def __init__(self, cluster_label: _Optional[str] = ..., storage_fingerprint: _Optional[bytes] = ..., protocol: _Optional[int] = ..., callee: _Optional[str] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("name", "address", "generation", "incarnation", "state", "phase", "instance", "public")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    generation: int
    incarnation: int
    state: int
    phase: int
    instance: int
    public: str
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., generation: _Optional[int] = ..., incarnation: _Optional[int] = ..., state: _Optional[int] = ..., phase: _Optional[int] = ..., instance: _Optional[int] = ..., public: _Optional[str] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("member", "accuser", "is_refused")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    ACCUSER_FIELD_NUMBER: _ClassVar[int]
    IS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    member: Member
    accuser: str
    is_refused: bool
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., accuser: _Optional[str] = ..., is_refused: bool = ...) -> None: ...

class Packet(_message.Message):
    __slots__ = ("kind", "sender", "target", "sequence", "subject", "members_hash", "ring_hash", "updates", "table")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_HASH_FIELD_NUMBER: _ClassVar[int]
    RING_HASH_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    kind: int
    sender: Member
    target: str
    sequence: int
    subject: str
    members_hash: int
    ring_hash: int
    updates: _containers.RepeatedCompositeFieldContainer[Update]
    table: _containers.RepeatedCompositeFieldContainer[Update]
    def __init__(self, kind: _Optional[int] = ..., sender: _Optional[_Union[Member, _Mapping]] = ..., target: _Optional[str] = ..., sequence: _Optional[int] = ..., subject: _Optional[str] = ..., members_hash: _Optional[int] = ..., ring_hash: _Optional[int] = ..., updates: _Optional[_Iterable[_Union[Update, _Mapping]]] = ..., table: _Optional[_Iterable[_Union[Update, _Mapping]]] = ...) -> None: ...

class GossipRequest(_message.Message):
    __slots__ = ("origin", "packet")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    PACKET_FIELD_NUMBER: _ClassVar[int]
    origin: Origin
    packet: Packet
    def __init__(self, origin: _Optional[_Union[Origin, _Mapping]] = ..., packet: _Optional[_Union[Packet, _Mapping]] = ...) -> None: ...

class GossipResponse(_message.Message):
    __slots__ = ("packet", "refusal")
    PACKET_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    packet: Packet
    refusal: str
    def __init__(self, packet: _Optional[_Union[Packet, _Mapping]] = ..., refusal: _Optional[str] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("batch", "seal")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    batch: bytes
    seal: bytes
    def __init__(self, batch: _Optional[bytes] = ..., seal: _Optional[bytes] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("origin", "items")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    origin: Origin
    items: _containers.RepeatedCompositeFieldContainer[Item]
    def __init__(self, origin: _Optional[_Union[Origin, _Mapping]] = ..., items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("method", "message", "timeout_ms", "request_id", "traceparent", "tracestate", "deadline_us", "retried_method", "mirror_for")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_US_FIELD_NUMBER: _ClassVar[int]
    RETRIED_METHOD_FIELD_NUMBER: _ClassVar[int]
    MIRROR_FOR_FIELD_NUMBER: _ClassVar[int]
    method: str
    message: bytes
    timeout_ms: int
    request_id: str
    traceparent: str
    tracestate: str
    deadline_us: int
    retried_method: str
    mirror_for: str
    def __init__(self, method: _Optional[str] = ..., message: _Optional[bytes] = ..., timeout_ms: _Optional[int] = ..., request_id: _Optional[str] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., deadline_us: _Optional[int] = ..., retried_method: _Optional[str] = ..., mirror_for: _Optional[str] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("answers", "seal")
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    answers: bytes
    seal: bytes
    def __init__(self, answers: _Optional[bytes] = ..., seal: _Optional[bytes] = ...) -> None: ...

class Answers(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    def __init__(self, answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("code", "message", "text", "keep_us", "instance", "expires_at_us")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    KEEP_US_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_US_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: bytes
    text: str
    keep_us: int
    instance: int
    expires_at_us: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[bytes] = ..., text: _Optional[str] = ..., keep_us: _Optional[int] = ..., instance: _Optional[int] = ..., expires_at_us: _Optional[int] = ...) -> None: ...

class InvalidateRequest(_message.Message):
    __slots__ = ("origin", "tokens", "everything", "await_ends")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    AWAIT_ENDS_FIELD_NUMBER: _ClassVar[int]
    origin: Origin
    tokens: _containers.RepeatedScalarFieldContainer[str]
    everything: bool
    await_ends: bool
    def __init__(self, origin: _Optional[_Union[Origin, _Mapping]] = ..., tokens: _Optional[_Iterable[str]] = ..., everything: bool = ..., await_ends: bool = ...) -> None: ...

class InvalidateResponse(_message.Message):
    __slots__ = ("instance", "have_ends_settled")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    HAVE_ENDS_SETTLED_FIELD_NUMBER: _ClassVar[int]
    instance: int
    have_ends_settled: bool
    def __init__(self, instance: _Optional[int] = ..., have_ends_settled: bool = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
