//! What lets someone in, or proves who sent it: not for everybody's eyes.

/// What stands for one.
pub(super) const REDACTED: &str = "<redacted>";

/// What names of header fields and parameters have in them whose values are credentials.
const PARTS: [&str; 12] = [
    "authorization",
    "cookie",
    "signature",
    "token",
    "secret",
    "password",
    "hmac",
    "api-key",
    "api_key",
    "apikey",
    "access-key",
    "credential",
];
/// Names of parameters that are too short to be looked for in others.
const PARAMETERS: [&str; 5] = ["key", "sig", "auth", "pass", "code"];

/// Whether a header field of this name has one as its value.
pub(super) fn is_credential(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    PARTS.iter().any(|part| name.contains(part))
}

/// A target without the values of parameters that are credentials.
pub(super) fn redacted(target: &str) -> String {
    let Some((path, query)) = target.split_once('?') else {
        return target.to_owned();
    };
    let is_secret = |name: &str| {
        let is_short = PARAMETERS
            .iter()
            .any(|short| name.eq_ignore_ascii_case(short));
        is_short || is_credential(name)
    };
    let shown = |parameter: &str| match parameter.split_once('=') {
        Some((name, _)) if is_secret(name) => format!("{name}={REDACTED}"),
        _ => parameter.to_owned(),
    };
    let query: Vec<String> = query.split('&').map(shown).collect();
    format!("{path}?{}", query.join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_known_by_their_names() {
        for name in [
            "Authorization",
            "Proxy-Authorization",
            "Cookie",
            "X-Hub-Signature-256",
            "X-Shopify-Hmac-Sha256",
            "X-Gitlab-Token",
            "Stripe-Signature",
            "X-API-Key",
        ] {
            assert!(is_credential(name), "{name}");
        }
        for name in [
            "Content-Type",
            "User-Agent",
            "X-GitHub-Event",
            "X-Forwarded-For",
        ] {
            assert!(!is_credential(name), "{name}");
        }
        assert_eq!(redacted("/a/token?b"), "/a/token?b");
        assert_eq!(
            redacted("/a?access_token=x&b=2&KEY=y=z&c&monkey=1"),
            "/a?access_token=<redacted>&b=2&KEY=<redacted>&c&monkey=1"
        );
    }
}
