"""The certificates of a throw-away control plane: two authorities, one leaf per component."""

from __future__ import annotations

import datetime
import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = datetime.timedelta(days=3650)


@dataclass(frozen=True)
class Authority:
    """A certificate authority whose key stays in memory except for its own files."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def _name(common_name: str, organization: str | None) -> x509.Name:
    attributes = (
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []
    )
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _write(
    folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> None:
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    _write_key(folder / f"{name}.key", key)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + LIFETIME)
    )


def make_authority(folder: Path, name: str, common_name: str) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(common_name, None)
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    certificate = (
        _builder(subject, subject, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder, name, certificate, key)
    return Authority(certificate, key)


def make_leaf(
    folder: Path,
    name: str,
    authority: Authority,
    common_name: str,
    organization: str | None = None,
    *,
    server_names: tuple[str, ...] = (),
) -> None:
    """Write NAME.crt and NAME.key; a client certificate, or a server's when names are given."""
    key = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if server_names else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = _builder(
        _name(common_name, organization), authority.certificate.subject, key
    ).add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if server_names:
        general: list[x509.GeneralName] = []
        for server_name in server_names:
            try:
                general.append(x509.IPAddress(ipaddress.ip_address(server_name)))
            except ValueError:
                general.append(x509.DNSName(server_name))
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    _write(folder, name, builder.sign(authority.key, hashes.SHA256()), key)


def write_kubeconfig(folder: Path, user: str, server: str) -> Path:
    path = folder / f"{user}.kubeconfig"
    path.touch(mode=0o600)
    cluster = {"server": server, "certificate-authority": str(folder / "ca.crt")}
    credentials = {
        "client-certificate": str(folder / f"{user}.crt"),
        "client-key": str(folder / f"{user}.key"),
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": user, "user": credentials}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
        "current-context": "test",
    }
    path.write_text(json.dumps(config, indent=1))
    return path


def make_pki(folder: Path, *, address: str, service_address: str, nodes: dict[str, str]) -> None:
    """Everything that start-up needs; `nodes` maps each node's name to its address."""
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    server = f"https://{f'[{address}]' if ':' in address else address}:6443"
    ca = make_authority(folder, "ca", "kubernetes-ca")
    front = make_authority(folder, "front-proxy-ca", "front-proxy-ca")
    names = (
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "127.0.0.1",
        address,
        service_address,
    )
    make_leaf(folder, "apiserver", ca, "kube-apiserver", server_names=names)
    make_leaf(folder, "kubelet-client", ca, "kube-apiserver-kubelet-client", "system:masters")
    make_leaf(folder, "front-proxy-client", front, "front-proxy-client")
    users = {
        "admin": ("admin", "system:masters"),
        "kcm": ("system:kube-controller-manager", None),
        "scheduler": ("system:kube-scheduler", None),
        **{node: (f"system:node:{node}", "system:nodes") for node in nodes},
    }
    for user, (common_name, organization) in users.items():
        make_leaf(folder, user, ca, common_name, organization)
        write_kubeconfig(folder, user, server)
    for node, node_address in nodes.items():
        make_leaf(
            folder,
            f"{node}-serving",
            ca,
            f"system:node:{node}",
            "system:nodes",
            server_names=(node_address,),
        )
    signing = ec.generate_private_key(ec.SECP256R1())
    _write_key(folder / "sa.key", signing)
    (folder / "sa.pub").write_bytes(
        signing.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
